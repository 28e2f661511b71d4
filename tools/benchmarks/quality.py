"""How well the method and its rivals learn at equal executed FLOPs: `python tools/bench.py quality`.

Every configuration of pretrain_configs/rivals is trained with several seeds, by the code of `megaroute pretrain`, on
the Python files of the standard library or on the text of --data.  A seed decides initial weights, the order of the
text and the routing noise, for all rivals alike, so differences are taken between runs of one seed.  Finished runs are
kept in --out and not repeated.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.corpus import make_corpus
from benchmarks.jobs import Job, run_jobs
from megaroute.common.errors import ConfigError
from megaroute.config.checks import check_config
from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.config.units import executed_layers

RIVALS = Path(__file__).resolve().parents[2] / "pretrain_configs" / "rivals"
BASELINE = "dense-effective"
"""Whose bits per byte the others' are compared with."""
FIRST_SEED = 1
SKIPPING = ("gumbel", "random", "mod", "early_exit", "random_ltd")
"""Routers that have a target density."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tools/bench.py quality`."""
    names = ", ".join(rivals())
    parser.add_argument("--rivals", type=lambda text: text.split(","), metavar="A,B,..", help=f"(all: {names})")
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of each (%(default)s)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (as configured)")
    parser.add_argument("--workers", type=_positive, default=2, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train, valid and tokenizer.model")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override, for all of them"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def rivals() -> list[str]:
    """Names of the configurations."""
    return sorted(path.stem for path in RIVALS.glob("*.yaml"))


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per rival.  Raises ConfigError for an unknown rival or an override that does not fit."""
    names = arguments.rivals or rivals()
    jobs = [Job(name, seed, _config(arguments, name, seed)) for name in names for seed in _seeds(arguments)]
    if arguments.data is None:
        make_corpus(_corpus(arguments), vocab_size=jobs[0].config.model.vocab_size)
    found = run_jobs(jobs, arguments.out / "runs", arguments.workers)
    by_name = {name: [result for result in found if result["name"] == name] for name in names}
    rows = [summary(by_name[name], by_name.get(BASELINE)) for name in names]
    return sorted(rows, key=lambda row: row["bits_per_byte"])


def _seeds(arguments: argparse.Namespace) -> range:
    return range(FIRST_SEED, FIRST_SEED + arguments.seeds)


def _corpus(arguments: argparse.Namespace) -> Path:
    return arguments.data or arguments.out / "corpus"


def _config(arguments: argparse.Namespace, name: str, seed: int) -> Config:
    if name not in rivals():
        raise ConfigError(f"--rivals: {name!r} is not in {RIVALS}; choose from {', '.join(rivals())}")
    data = _corpus(arguments)
    overrides = [
        f"data.train={data / 'train'}",
        f"data.valid={data / 'valid'}",
        f"data.tokenizer={data / 'tokenizer.model'}",
        f"data.seed={seed}",
        f"train.seed={seed}",
        f"run.directory={arguments.out / 'work'}",
        "checkpoint.resume=false",
    ]
    steps = [] if arguments.steps is None else [f"train.steps={arguments.steps}"]
    config = load_config(RIVALS / f"{name}.yaml", [*overrides, *steps, *arguments.set])
    check_config(config, 1, "gloo")
    return config


def summary(runs: list[dict[str, Any]], baseline: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The row of one rival; `baseline` are the runs of dense-effective with the same seeds, if it was trained."""
    config = Config.model_validate(runs[0]["config"])
    bits = [run["bits_per_byte"] for run in runs]
    differences = (
        [value - other["bits_per_byte"] for value, other in zip(bits, baseline, strict=True)] if baseline else []
    )
    flops = statistics.fmean(run["flops_per_token"] for run in runs)
    return {
        "rival": runs[0]["name"],
        "mflops_per_token": flops / 1e6,
        "flops_ratio": flops / statistics.fmean(run["flops_per_token"] for run in baseline) if baseline else None,
        "layers": statistics.fmean(_layers(config, run["density"]) for run in runs),
        "valid_layers": statistics.fmean(_layers(config, run["valid_density"]) for run in runs),
        "target": _mean(config.routing.targets(config.model.num_layers)) if config.routing.router in SKIPPING else None,
        "density": _mean([share for run in runs for share in run["density"]]),
        "bits_per_byte": statistics.fmean(bits),
        "error": standard_error(bits),
        "difference": _mean(differences),
        "difference_error": standard_error(differences),
        "nonfinite": sum(run["nonfinite"] for run in runs),
        "seeds": len(runs),
        "steps": runs[0]["steps"],
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def _layers(config: Config, density: Sequence[float]) -> float:
    return executed_layers(config.model.num_layers, config.units, density)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
