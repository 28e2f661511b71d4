"""`megaroute evaluate`: bits per byte of files, or the tasks of a suite."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaroute.common import log
from megaroute.common.errors import UserError
from megaroute.common.files import atomic_write, write_json
from megaroute.evaluation import perplexity, suite, suite_table, task_list
from megaroute.evaluation.open import Precision, open_model
from megaroute.evaluation.scoring import Scorer
from megaroute.parallel import groups
from megaroute.platform import distributed


def files(
    model: Path,
    paths: list[Path],
    tensor: int,
    pipeline: int,
    precision: Precision,
    batch: int,
    stride: int | None,
    limit: int | None,
    text_field: str,
    out: Path | None,
) -> int:
    """Score text files; rank 0 prints the result as JSON, or writes it to `out`, and says it in a line."""
    found = perplexity.text_files(paths)
    check_out(out)

    def score(scorer: Scorer) -> dict[str, Any] | None:
        return perplexity.bits_per_byte(scorer, found, batch, stride, limit, text_field)

    return _on_ranks(lambda: open_model(model, tensor, pipeline, precision), score, perplexity.sentence, out)


def tasks(
    model: Path,
    names: list[str] | None,
    data_dir: Path | None,
    tensor: int,
    pipeline: int,
    precision: Precision,
    batch: int,
    limit: int | None,
    out: Path | None,
) -> int:
    """Run the suite; rank 0 prints the result as JSON and as a table, or writes `out` and the table beside it."""
    task_list.stay_offline(data_dir)
    task_list.check_installed()
    chosen = task_list.choose(names, data_dir)
    check_out(out)
    return _on_ranks(
        lambda: open_model(model, tensor, pipeline, precision),
        lambda scorer: suite.run(scorer, chosen, data_dir, batch, limit),
        suite_table.table,
        out,
    )


def check_out(out: Path | None) -> None:
    """Raise UserError when the result could not be written in the end."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out} is not a file in a folder that exists, so the result would be lost; name another")


def _on_ranks(
    opened: Callable[[], Scorer],
    work: Callable[[Scorer], dict[str, Any] | None],
    say: Callable[[dict[str, Any]], str],
    out: Path | None,
) -> int:
    log.configure()
    try:
        result = work(opened())
        if result is not None:
            if out is None:
                print(json.dumps(result, indent=2))
            else:
                write_json(out, result)
                if "suite" in result:
                    atomic_write(out.with_suffix(".md"), say(result) + "\n")
            print(say(result), file=sys.stderr)
        dist.barrier()
        return 0
    finally:
        groups.tear_down()
        distributed.stop()
