"""What stands in the way of a fair comparison of runs: a sentence each."""

from collections.abc import Mapping
from typing import Any

from megaroute.metrics.formats import percent
from megaroute.metrics.run_view import RunView
from megaroute.metrics.summary import density_of, final

Runs = Mapping[str, RunView]
"""Runs by the names that tell them apart, in order."""

DIFFERENCES = {
    "data.train": "the runs learned from other text",
    "data.valid": "they were validated on other text",
    "train.validate_samples": "they were validated on other rows",
    "data.tokenizer": "nats per token cannot be compared, bits per byte can",
    "data.sequence_length": "tokens are predicted from contexts of other lengths",
    "train.global_batch": "equally many tokens are not equally many updates",
    "train.precision": "rounding differs, and speeds are those of other arithmetic",
    "train.seed": "initial weights and routing noise differ, so a small difference may be chance",
    "data.seed": "the text came in another order, so a small difference may be chance",
    "model.init_std": "the runs started from other weights",
    "routing.init_logit_std": "the routers started from other weights",
}
"""Settings that must agree, and what it means when they do not."""

WITH_LOGITS = ("gumbel", "early_exit", "mod", "highway")
"""Routers that routing.init_logit_std is about."""

FAR = 0.1
"""Validation that executes another share of the tokens than training, by more than this, is worth a word."""


def cautions(runs: Runs) -> list[str]:
    """Every sentence, settings first."""
    notes = [f"{key} differs ({told}): {what}." for key, what in DIFFERENCES.items() if (told := _told(runs, key))]
    found = [_optimizer(runs), _steps(runs), _tokens(runs), _validation(runs)]
    notes += [note for note in found if note]
    for name, run in runs.items():
        if reason := _looks_ahead(run):
            notes.append(f"{name}: {reason}, so its training loss knows of later tokens; compare validation.")
    return notes


def _told(runs: Runs, key: str) -> str:
    """Values of a setting by run, where they differ; of routers, among runs whose routers have logits."""
    asked = {name: run for name, run in runs.items() if not key.startswith("routing.") or run.router in WITH_LOGITS}
    values = {name: run.setting(key) for name, run in asked.items()}
    if len({str(value) for value in values.values()}) < 2:
        return ""
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else "not set" if value is None else str(value)


def _optimizer(runs: Runs) -> str:
    sections = [run.setting("optim") for run in runs.values()]
    names = dict.fromkeys(name for section in sections if isinstance(section, Mapping) for name in section)
    differ = [f"optim.{name} ({told})" for name in names if (told := _told(runs, f"optim.{name}"))]
    return f"The optimizers differ in {', '.join(differ)}: a difference may be theirs." if differ else ""


def _steps(runs: Runs) -> str:
    told = _told(runs, "train.steps")
    if not told:
        return ""
    if any(_schedule_ends_with(run) for run in runs.values()):
        return (
            f"train.steps differs ({told}): the learning rate falls until the last step, so at equal tokens the runs "
            "stand at other places of their schedules, and neither ends nor curves can be compared; train them for "
            "equally many steps."
        )
    return f"train.steps differs ({told}), the schedules of the learning rate do not: compare at equal tokens."


def _schedule_ends_with(run: RunView) -> bool:
    """Whether the learning rate depends on the number of steps."""
    return run.setting("optim.decay") in (None, "cosine") and run.setting("optim.decay_steps") is None


def _tokens(runs: Runs) -> str:
    tokens = {run.history.train[-1].tokens if run.history.train else 0 for run in runs.values()}
    if len(tokens) == 1:
        return ""
    return (
        "The runs have not seen equally many tokens, so the table compares unequal ends: where schedules agree, "
        "compare curves at equal tokens."
    )


def _validation(runs: Runs) -> str:
    shares = {name: (executed_in_validation(run), density_of(final(run.history.train))) for name, run in runs.items()}
    known = {name: (v, t) for name, (v, t) in shares.items() if v is not None and t is not None}
    far = [f"{name} {percent(v)} after {percent(t)}" for name, (v, t) in known.items() if abs(v - t) > FAR]
    if not far:
        return ""
    return (
        f"Validation executes another share of the tokens than training did ({', '.join(far)}): what training spent, "
        'on which "Validation against executed FLOPs" places a run, is not what its predictions cost.'
    )


def executed_in_validation(run: RunView) -> float | None:
    """Share of tokens that the last validation executed, mean over the units; None where there is none."""
    last = run.history.valid[-1:]
    return sum(last[0].density) / len(last[0].density) if last and last[0].density else None


def _looks_ahead(run: RunView) -> str:
    if run.router == "mod":
        return "router mod executes the top of the whole sequence in training"
    if run.router == "moe":
        return "experts of limited capacity drop tokens in training"
    if run.setting("routing.dispatch.mode") == "capacity" and run.router != "dense":
        return "dispatch mode capacity drops tokens in training"
    return ""
