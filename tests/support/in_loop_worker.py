"""One rank of a test of tasks in the loop: `python in_loop_worker.py spec.json out.json`.

The spec has a configuration file, overrides and a number of steps; the output is what this rank was told of the tasks.
The last step is saved.
"""

import dataclasses
import json
import sys
from pathlib import Path


def main() -> None:
    import torch.distributed as dist

    from megaroute.config.load import load_config
    from megaroute.evaluation.in_loop import InLoop
    from megaroute.platform import device, distributed
    from megaroute.training.setup import gather_cursor, run_record, setup
    from megaroute.training.step import run_step

    spec_file, out_file = map(Path, sys.argv[1:])
    spec = json.loads(spec_file.read_text())
    config = load_config(Path(spec["config"]), spec["overrides"])
    platform = device.resolve("cpu")
    _, world_size = distributed.start(platform)
    parts = setup(config, platform, world_size)
    score_tasks = InLoop(config)
    for _ in range(spec["steps"]):
        result = run_step(parts)
        parts.state.advance(result.rows, config.data.sequence_length, result.skipped)
    scores = score_tasks(parts)
    parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts))
    out_file.write_text(json.dumps({name: dataclasses.asdict(score) for name, score in scores.items()}))
    dist.barrier()
    if parts.stream is not None:
        parts.stream.close()
    distributed.stop()


if __name__ == "__main__":
    main()
