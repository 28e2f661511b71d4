"""What a step took from the data, summed over the replicas with everything else that a step must know."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megaroute.config.root import Config
from megaroute.data.ledger import WORDS, from_words, words
from megaroute.data.stream import Batch
from megaroute.parallel.groups import Groups


@dataclass(frozen=True)
class Supply:
    """The rows of a step, all replicas together."""

    digest: int = 0
    """Sum of the rows' digests modulo 2^128."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens by source."""
    skipped: int = 0
    """Slices given up for damage."""
    wait_s: float = 0.0
    """Longest time that a replica waited for its rows."""


def columns(config: Config, groups: Groups, batch: Batch | None) -> list[float]:
    """This rank's share of the sum: WORDS of digest, tokens of each source, skipped slices, wait of each replica.

    One rank of each replica speaks, the first stage's tensor rank 0; the wait has a place for each replica, since a sum
    is all that the ranks exchange.
    """
    names = list(config.data.sources)
    wait = [0.0] * groups.dims.data
    if batch is None or groups.tensor_rank or not groups.is_first_stage:
        return [0.0] * (WORDS + len(names) + 1) + wait
    wait[groups.data_rank] = batch.wait_s
    tokens = [float(batch.tokens.get(name, 0)) for name in names]
    return [*map(float, words(batch.digest)), *tokens, float(batch.skipped), *wait]


def supply_of(config: Config, sums: Sequence[float]) -> Supply:
    """The meaning of the summed columns."""
    names = list(config.data.sources)
    counts = list(map(round, sums[WORDS : WORDS + len(names)]))
    return Supply(
        digest=from_words(list(map(round, sums[:WORDS]))),
        tokens=dict(zip(names, counts, strict=True)),
        skipped=round(sums[WORDS + len(names)]),
        wait_s=max(sums[WORDS + len(names) + 1 :]),
    )
