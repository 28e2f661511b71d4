"""One rank of a training test: `python train_worker.py spec.json out.json`.

The spec lists runs, each {"name", "config", "overrides", "steps", "save"}; a run starts from the newest checkpoint of
its run directory, if there is one.  The output has per run the step's numbers and this rank's routing decisions.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

# Megatron-core's checkpoint writer spawns a process that imports this file again: heavy imports wait inside functions.


def decisions(result: Any) -> list:
    """[unit, sample, kept positions, positions whose margin is under 1e-5] of every record of this rank."""
    found = []
    for micro in result.micros:
        for unit, record in sorted(micro.info.routing.records.items()):
            for row, sample in enumerate(micro.info.routing.samples_B.tolist()):
                kept = record.keep_SB[:, row].nonzero().flatten().tolist()
                # Under sequence parallelism the margin is that of a slice: only whole ones are comparable.
                margin = record.margin_SB
                whole = margin is not None and margin.shape == record.keep_SB.shape
                close = (margin[:, row].abs() < 1e-5).nonzero().flatten().tolist() if whole else []
                found.append([unit, sample, kept, close])
    return found


def without_times(totals: dict) -> dict:
    del totals["supply"]["wait_s"]
    return totals


def train(run: dict) -> list[dict]:
    import torch.distributed as dist

    from megaroute.config.load import load_config
    from megaroute.platform import device
    from megaroute.training.setup import gather_cursor, run_record, setup
    from megaroute.training.step import run_step

    config = load_config(Path(run["config"]), run["overrides"])
    platform = device.resolve("cpu")
    parts = setup(config, platform, dist.get_world_size())
    steps = []
    for _ in range(run["steps"]):
        result = run_step(parts)
        padding = result.totals.padding
        parts.state.advance(result.rows, config.data.sequence_length, result.skipped, padding=padding)
        numbers = {
            "step": parts.state.step,
            "loss": result.totals.loss,
            "budget_loss": result.budget_loss,
            "grad_norm": result.grad_norm,
            "density": list(result.totals.density),
            "skipped": result.skipped,
            "rows": list(result.totals.rows),
            "totals": without_times(dataclasses.asdict(result.totals)),
            "digest": parts.ledger.text,
            "flops": result.flops.parts,
            "rank_rows": result.load.rank_rows,
        }
        steps.append({**numbers, "decisions": decisions(result)})
    if run.get("save"):
        parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts))
    if parts.stream is not None:
        parts.stream.close()
    for chunk in parts.wrapped:
        # Its hooks hold a cycle that Python cannot see, and with it process groups and their polling threads.
        chunk.grad_accs.clear()
    return steps


def main() -> None:
    import torch.distributed as dist

    from megaroute.platform import device, distributed

    spec_file, out_file = map(Path, sys.argv[1:])
    distributed.start(device.resolve("cpu"), timeout_s=120)
    spec = json.loads(spec_file.read_text())
    out_file.write_text(json.dumps({run["name"]: train(run) for run in spec["runs"]}))
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
