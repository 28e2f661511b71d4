"""What a step took from the data, summed over the replicas with everything else that a step must know."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megaroute.common.errors import MegarouteError
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
    agreed: bool = True
    """Whether all ranks of each replica that read rows have read the same."""

    def check(self, step: int) -> None:
        """Raise MegarouteError when inputs and targets of a step may be of different rows."""
        if not self.agreed:
            raise MegarouteError(
                f"ranks of one replica read different rows in step {step}, so inputs and targets do not belong "
                f"together; look for a shard that only some nodes can read or that differs between them"
            )


def columns(config: Config, groups: Groups, batch: Batch | None) -> list[float]:
    """This rank's share of the sum: readers and the lowest word of what they read, then, of one reader of each replica,
    WORDS of digest, tokens of each source, skipped slices, and wait by replica.

    That reader is the first stage's tensor rank 0.  The wait has a place for each replica, since a sum is all that the
    ranks exchange.
    """
    names = list(config.data.sources)
    wait = [0.0] * groups.dims.data
    if batch is None:
        return [0.0] * (2 + WORDS + len(names) + 1) + wait
    digest = list(map(float, words(batch.digest)))
    if groups.tensor_rank or not groups.is_first_stage:
        return [1.0, digest[0]] + [0.0] * (WORDS + len(names) + 1) + wait
    wait[groups.data_rank] = batch.wait_s
    tokens = [float(batch.tokens.get(name, 0)) for name in names]
    return [1.0, digest[0], *digest, *tokens, float(batch.skipped), *wait]


def supply_of(config: Config, replicas: int, sums: Sequence[float]) -> Supply:
    """The meaning of the columns summed over all ranks of `replicas` replicas."""
    names = list(config.data.sources)
    (readers, read), sums = map(round, sums[:2]), sums[2:]
    counts = list(map(round, sums[WORDS : WORDS + len(names)]))
    return Supply(
        digest=from_words(list(map(round, sums[:WORDS]))),
        tokens=dict(zip(names, counts, strict=True)),
        skipped=round(sums[WORDS + len(names)]),
        wait_s=max(sums[WORDS + len(names) + 1 :]),
        # Every replica has as many readers, each of which adds the word that one of them speaks for.
        agreed=read * replicas == readers * round(sums[0]),
    )
