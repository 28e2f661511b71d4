"""What a run has read: one checksum, tokens by source, and what was skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megaroute.common.errors import DataError
from megaroute.data.rows import DIGEST_BITS

WORD_BITS = 32
WORDS = DIGEST_BITS // WORD_BITS


@dataclass
class Ledger:
    """Running account of the rows consumed by all replicas together.

    The digest is the sum modulo 2^128 of the digests of all rows, each of which holds its row's number.  Rows may
    therefore be added in any order and in any batches: two runs that have consumed equally many rows have the same
    digest if and only if, but for chance, all their rows are the same.
    """

    digest: int = 0
    """Checksum of all rows."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens by source."""
    skipped: int = 0
    """Slices given up for damage."""

    @property
    def text(self) -> str:
        """The digest as 32 hexadecimal digits."""
        return f"{self.digest:0{DIGEST_BITS // 4}x}"

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens, by source; nothing before the first token."""
        total = sum(self.tokens.values())
        return {name: count / total for name, count in self.tokens.items()} if total else {}

    def add(self, digest: int, tokens: Mapping[str, int], skipped: int) -> None:
        """Count the rows of a step."""
        self.digest = (self.digest + digest) % 2**DIGEST_BITS
        for name, count in tokens.items():
            self.tokens[name] = self.tokens.get(name, 0) + count
        self.skipped += skipped

    def check_budget(self, budget: int) -> None:
        """Raise DataError when more slices were skipped than data.skip_budget allows."""
        if self.skipped > budget:
            raise DataError(
                f"data.skip_budget: the run skipped {self.skipped} slices that could not be read, more than {budget}, "
                f"so it learns from other text than was asked for; repair the shards, or raise data.skip_budget"
            )


def words(digest: int) -> list[int]:
    """The digest cut into words, lowest first; few enough bits that a float64 sums millions of each exactly."""
    return [digest >> (WORD_BITS * i) & (2**WORD_BITS - 1) for i in range(WORDS)]


def from_words(sums: Sequence[int]) -> int:
    """The sum of digests from the sums of their words."""
    return sum(value << (WORD_BITS * i) for i, value in enumerate(sums)) % 2**DIGEST_BITS
