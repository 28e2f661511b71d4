"""One rank of an evaluation test: `python evaluate_worker.py spec.json out.json`.

The spec has the run, the sizes of tensor and pipeline parallelism, and a text file or a folder of tasks; the output is
what this rank got.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    import torch.distributed as dist

    from megaroute.evaluation import suite, task_list
    from megaroute.evaluation.open import open_model
    from megaroute.evaluation.perplexity import bits_per_byte, text_files
    from megaroute.platform import distributed

    spec_file, out_file = map(Path, sys.argv[1:])
    spec = json.loads(spec_file.read_text())
    scorer = open_model(Path(spec["run"]), spec["tensor"], spec["pipeline"])
    if "tasks" in spec:
        folder = Path(spec["tasks"])
        result = suite.run(scorer, task_list.choose(None, folder), folder, spec["batch"])
    else:
        result = bits_per_byte(scorer, text_files([Path(spec["texts"])]), spec["batch"])
    out_file.write_text(json.dumps(result))
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
