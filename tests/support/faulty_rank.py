"""One rank of a run that goes wrong: `python faulty_rank.py fault.json CONFIG KEY=VALUE ..`, as `megaroute pretrain`.

The fault is {"rank", "step", "kind", ..}: what happens on that rank at the beginning of that step, or of each of them,
from 1; without a kind nothing does.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

# Megatron-core's checkpoint writer spawns a process that imports this file again: heavy imports wait inside functions.


def sleep(parts: Any, fault: dict) -> None:
    time.sleep(600)


def fail(parts: Any, fault: dict) -> None:
    raise ValueError("a fault of this rank alone")


def flip(parts: Any, fault: dict) -> None:
    """Flip the lowest bit of the first value of a parameter or buffer: a millionth of a percent."""
    import torch

    value = dict([*parts.chunks[0].named_parameters(), *parts.chunks[0].named_buffers()])[fault["name"]]
    value.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def nan(parts: Any, fault: dict) -> None:
    """Have this rank's loss, and so its gradient, be no number in this step."""
    from megaroute.training import forward

    mean_loss = forward._mean_loss

    def poisoned(*arguments: Any) -> Any:
        forward._mean_loss = mean_loss
        loss, more = mean_loss(*arguments)
        return loss * float("nan"), more

    forward._mean_loss = poisoned


FAULTS = {"sleep": sleep, "fail": fail, "flip": flip, "nan": nan}


def install(fault: dict) -> None:
    """Before torch: a rank that listens to signals only after it has been imported would be another one."""
    if "kind" not in fault:
        return
    import os

    if int(os.environ["RANK"]) != fault["rank"]:
        return
    import megaroute.training.pretrain as pretrain
    from megaroute.training import loop

    assert pretrain.loop is loop
    run_step = loop.run_step

    def faulty(parts: Any, stop: bool) -> Any:
        steps = fault["step"] if isinstance(fault["step"], list) else [fault["step"]]
        if parts.state.step + 1 in steps:
            FAULTS[fault["kind"]](parts, fault)
        return run_step(parts, stop)

    loop.run_step = faulty


def main() -> int:
    from megaroute import cli

    install(json.loads(Path(sys.argv[1]).read_text()))
    return cli.main(["pretrain", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
