"""The report's words and numbers: what the run is, how it went, what its attempts did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megaroute.metrics.formats import duration, percent, si
from megaroute.metrics.history import differences, overlap
from megaroute.metrics.records import TrainRecord
from megaroute.metrics.routing_text import routing_text, target_text
from megaroute.metrics.run_view import RunView
from megaroute.metrics.throughput import utilisation

FINAL_SHARE = 0.1
"""Final values are means over this share of the steps, the last ones: a single step is noise."""


@dataclass(frozen=True)
class Fact:
    """One row of a table: what, how much, and what it means."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    number: int
    first_step: int | None
    last_step: int | None
    seconds: float
    where: str
    """Device and number of ranks, and the layout when it was recorded."""
    ending: str


def state(run: RunView) -> str:
    """One sentence: how far the run came and how it ended."""
    planned = f" of {run.steps_planned:,}" if run.steps_planned else ""
    done = f"Steps completed: {run.steps_done:,}{planned}."
    ending = run.ending
    if ending is None:
        return f"{done} {_unended(run)}"
    if ending.kind == "error":
        return f"{done} The run {ending.message.rstrip('.')}."
    resumable = " It can be resumed." if ending.kind == "stop" else ""
    return f"{done} The run's last word: {ending.message.rstrip('.')}.{resumable}"


def _unended(run: RunView) -> str:
    ago = f"its last record was {duration(run.age)} old when this page was written"
    if run.silent:
        return f"The run was cut off, without an end: {ago}. The same command goes on from its newest checkpoint."
    return f"The run goes on: {ago}."


def shape(run: RunView) -> list[Fact]:
    """What was trained, on what."""
    facts = [
        Fact("Model", _model(run)),
        Fact("Routing", routing_text(run)),
        Fact("Layout", _layout(run)),
        Fact("Batch", _batch(run)),
    ]
    return [fact for fact in facts if fact.value]


def results(run: RunView) -> list[Fact]:
    """Key results, those that there are."""
    if not run.history.train:
        return []
    return [*_losses(run), *_work(run), *_data(run), *_trust(run)]


def attempts(run: RunView) -> list[Attempt]:
    """Every start of the run, in order."""
    return [_attempt(run, number) for number in run.history.attempts]


def final(train: tuple[TrainRecord, ...]) -> tuple[TrainRecord, ...]:
    """The last FINAL_SHARE of the steps, at least one."""
    return train[-max(1, math.ceil(FINAL_SHARE * len(train))) :]


def density_of(records: Sequence[TrainRecord]) -> float | None:
    """Share of tokens executed, mean over units and steps; None where nothing is routed."""
    densities = [sum(r.density) / len(r.density) for r in records if r.density]
    return _mean(densities) if densities else None


def _model(run: RunView) -> str:
    parts = [f"{si(run.about['parameters'])} parameters"] if run.about.get("parameters") else []
    names = (
        ("model.num_layers", "layers"),
        ("model.hidden_size", "hidden"),
        ("model.num_attention_heads", "heads"),
        ("model.ffn_hidden_size", "MLP"),
        ("model.vocab_size", "vocabulary"),
    )
    parts += [f"{name} {run.setting(key):,}" for key, name in names if run.number(key) is not None]
    return ", ".join(parts)


def _layout(run: RunView) -> str:
    degrees = {name: run.setting(f"parallel.{name}") for name in ("tensor", "pipeline", "data")}
    from_config = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree)
    layout = run.about.get("layout") or from_config
    parts = [str(layout)] if layout else []
    if run.about.get("world_size"):
        parts.append(f"{run.about['world_size']} x {run.about.get('device', 'unknown device')}")
    if precision := run.setting("train.precision"):
        parts.append(str(precision))
    return "; ".join(parts)


def _batch(run: RunView) -> str:
    rows, length = run.number("train.global_batch"), run.number("data.sequence_length")
    if rows is None or length is None:
        return ""
    return f"{rows:,} rows of {length:,} tokens, {si(rows * length)} tokens a step"


def _losses(run: RunView) -> list[Fact]:
    last = final(run.history.train)
    loss = _mean([r.loss for r in last])
    steps = f"mean of the last {len(last):,} steps" if len(last) > 1 else "last step"
    facts = [Fact("Training loss", f"{loss:.4f} nats per token", f"{steps}; perplexity {_exp(loss)}")]
    if run.history.valid:
        valid = run.history.valid[-1]
        note = f"validation loss {valid.loss:.4f} nats per token on {valid.rows:,} rows, after step {valid.step:,}"
        facts.append(Fact("Validation", f"{valid.bits_per_byte:.4f} bits per byte", note))
    for name, score in run.history.tasks[-1].scores.items() if run.history.tasks else ():
        note = f"{score.metric} of {score.documents:,} documents, after step {run.history.tasks[-1].step:,}"
        facts.append(Fact(name, f"{100 * score.value:.1f} %", note))
    return facts


def _work(run: RunView) -> list[Fact]:
    train, last = run.history.train, final(run.history.train)
    executed, dense = sum(r.executed_flops for r in train), sum(r.dense_flops for r in train)
    facts = []
    if run.units:
        target = f"target {text}; " if (text := target_text(run)) else ""
        densities = [sum(r.density) / len(r.density) for r in last if r.density]
        who = "an expert computes" if run.router == "moe" else "a routed unit executes"
        range_note = f"{target}share of tokens that {who}, mean over units"
        facts.append(Fact("Density", percent(_mean(densities)), range_note))
        facts += _decided(run)
    if dense:
        note = f"{si(executed, 'FLOP')} instead of {si(dense, 'FLOP')}; keys, values and routers are counted"
        facts.append(Fact("Arithmetic executed", f"{percent(executed / dense)} of dense", note))
    facts.append(Fact("Tokens", si(train[-1].tokens), f"{train[-1].samples:,} rows"))
    facts += _speed(run, last)
    facts.append(Fact("Time in steps", duration(sum(r.seconds for r in train)), "without start, validation and saving"))
    return facts


def _data(run: RunView) -> list[Fact]:
    """Shares of the sources, the checksum of all rows, and how long steps waited for theirs."""
    last = run.history.train[-1]
    facts = []
    if len(last.data_shares) > 1:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in last.data_shares.items())
        facts.append(Fact("Sources", shares, "measured share of the tokens"))
    if digest := last.data.get("digest"):
        note = f"of {last.samples:,} rows: runs that have read the same text have the same checksum at the same row"
        facts.append(Fact("Data checksum", str(digest), note))
    waits = [(r.data["wait_s"], r.seconds) for r in run.history.train if "wait_s" in r.data]
    if seconds := sum(step for _, step in waits):
        share = sum(wait for wait, _ in waits) / seconds
        facts.append(Fact("Waiting for data", percent(share), "of the time in steps, of the replica waiting longest"))
    if skipped := last.data.get("skipped"):
        facts.append(Fact("Damaged slices", f"{skipped:,}", "of text that could not be read were skipped"))
    return facts


def _decided(run: RunView) -> list[Fact]:
    """Density where the router decides alone, and what capacity refused."""
    facts, valid = [], run.history.valid[-1:]
    if valid and valid[0].density:
        how = "the same routers without noise" if run.validates_greedily else "as inference routes"
        facts.append(Fact("Validation density", percent(_mean(list(valid[0].density))), f"mean over units; {how}"))
    counted = [r for r in run.history.train if r.overflow]
    if any(sum(r.overflow) for r in counted):
        note = "of what the routers wanted found no capacity, mean over the run"
        facts.append(Fact("Overflow", percent(_mean([r.overflow_share for r in counted])), note))
    return facts


def _speed(run: RunView, last: Sequence[TrainRecord]) -> list[Fact]:
    """Tokens per second; FLOP/s and utilisation of what was executed, and of every token in every layer."""
    seconds = sum(r.seconds for r in last)
    tokens, executed, dense = (
        sum(values) / seconds if seconds else 0.0
        for values in (
            [r.tokens_per_second * r.seconds for r in last],
            [r.executed_flops for r in last],
            [r.dense_flops for r in last],
        )
    )
    note = f"{si(executed, 'FLOP/s')} executed, {si(dense, 'FLOP/s')} dense-equivalent"
    facts = [Fact("Speed", f"{si(tokens)} tokens/s", note)]
    shares = [_mfu(run, executed), _mfu(run, dense)]
    if shares[0] is not None and shares[1] is not None:
        note = f"of the devices' peak (MFU), on executed FLOPs; {percent(shares[1])} on dense-equivalent FLOPs"
        facts.append(Fact("Utilisation", percent(shares[0]), note))
    return facts


def _mfu(run: RunView, flops_per_second: float) -> float | None:
    device, ranks = run.about.get("device"), run.about.get("world_size")
    if not device or not ranks:
        return None
    return utilisation(flops_per_second, str(device), str(run.setting("train.precision")), int(ranks))


def _trust(run: RunView) -> list[Fact]:
    facts = []
    skipped = sum(r.skipped_update for r in run.history.train)
    if skipped:
        facts.append(
            Fact("Updates left out", f"{skipped:,}", "their loss or gradient was not finite, or a spike (train.spike)")
        )
    pairs = overlap(run.history)
    if not pairs:
        return facts
    differing = [(step, differences(a, b)) for step, a, b in pairs if differences(a, b)]
    if not differing:
        note = "a resumed attempt computed them again: loss, gradient norm and densities are the same bits"
        return [*facts, Fact("Steps computed twice", f"{len(pairs):,}, all bit-equal", note)]
    step, names = differing[0]
    spread = max((abs(a.loss - b.loss) / abs(a.loss) for _, a, b in pairs if math.isfinite(a.loss - b.loss)), default=0)
    note = f"first at step {step:,} in {', '.join(names)}; losses differ by {spread:.1e} relative at most"
    return [*facts, Fact("Steps computed twice", f"{len(pairs):,}, {len(differing):,} differ", note)]


def _attempt(run: RunView, number: int) -> Attempt:
    steps = run.history.of_attempt(number)
    events = [event for event in run.history.events if event.attempt == number]
    about = next((event.values for event in events if event.kind in ("start", "resume")), {})
    where = f"{about['world_size']} x {about['device']}" if {"world_size", "device"} <= set(about) else ""
    ended = run.ending_of(number)
    running = number == run.history.attempts[-1] and not run.silent
    ending = ended.message if ended else "goes on" if running else "cut off: no end recorded"
    return Attempt(
        number=number,
        first_step=steps[0].step if steps else None,
        last_step=steps[-1].step if steps else None,
        seconds=sum(r.seconds for r in steps),
        where=", ".join(filter(None, (where, str(about.get("layout", ""))))),
        ending=ending,
    )


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _exp(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "unknown"
