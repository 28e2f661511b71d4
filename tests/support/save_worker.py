"""One rank of a run whose saving fails: `python save_worker.py spec.json out.json`.

The spec has "config", "overrides", "rank" (the one that fails), "at" ("write", "stage" or "plan") and "wait".  Writes
the sentence with which this rank ended, and after how many steps.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    import torch.distributed as dist

    from megaroute.checkpoint import manager
    from megaroute.common.errors import MegarouteError
    from megaroute.config.load import load_config
    from megaroute.platform import device, distributed
    from megaroute.training import setup
    from megaroute.training.step import run_step

    spec_file, out_file = map(Path, sys.argv[1:])
    spec = json.loads(spec_file.read_text())
    rank, _ = distributed.start(device.resolve("cpu"), timeout_s=60)
    config = load_config(Path(spec["config"]), spec["overrides"])
    parts = setup.setup(config, device.resolve("cpu"), dist.get_world_size())

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    ended, saved = "", 0
    try:
        for step in range(1, 5):
            result = run_step(parts)
            parts.state.advance(result.rows, config.data.sequence_length, result.skipped)
            if step == 2 and rank == spec["rank"]:
                if spec["at"] == "write":
                    manager.write = fails
                else:
                    manager.Staging.fill = fails
            parts.checkpoints.save(setup.run_record(parts), lambda: setup.gather_cursor(parts), spec["wait"])
            parts.checkpoints.drain()
            saved = step
    except MegarouteError as error:
        ended = str(error)
    out_file.write_text(json.dumps({"ended": ended, "saved": saved}))
    dist.barrier()
    if parts.stream is not None:
        parts.stream.close()
    for chunk in parts.wrapped:
        chunk.grad_accs.clear()
    distributed.stop()


if __name__ == "__main__":
    main()
