"""One checksum of all rows: the same for every batching and topology, and another for any other row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaroute.common.errors import DataError
from megaroute.data.ledger import Ledger, from_words, words
from megaroute.data.rows import Span, row_digest
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data
DIGESTS = st.integers(0, 2**128 - 1)


def test_it_does_not_depend_on_batches_and_replicas(data):
    def digest(dp_size: int, counts: list[int]) -> str:
        ledger = Ledger()
        streams = [open_stream(data, "train", rank, dp_size) for rank in range(dp_size)]
        for count in counts:
            for stream in reversed(streams):
                batch = stream.take(count)
                ledger.add(batch.digest, batch.tokens, batch.skipped)
        assert ledger.tokens == {"train": 48 * 33} and ledger.shares == {"train": 1.0}
        return ledger.text

    assert digest(1, [48]) == digest(1, [16] * 3) == digest(2, [20, 4]) == digest(8, [1, 2, 3])
    assert len(digest(1, [48])) == 32


def test_any_other_row_gives_another():
    ids, spans = np.arange(5, dtype=np.int32), (Span("a", 0, 1, 2, 3, 5),)
    found = {row_digest(0, ids, spans), row_digest(1, ids, spans), row_digest(0, ids[::-1], spans)}
    for field in Span._fields[1:]:
        found.add(row_digest(0, ids, (spans[0]._replace(**{field: 9}),)))
    found.add(row_digest(0, ids, (spans[0]._replace(source="b"),)))
    assert len(found) == 9


def test_it_is_pinned():
    """Runs of different versions must be comparable."""
    assert row_digest(7, np.arange(3, dtype=np.int32), (Span("a", 0, 1, 2, 0, 3),)) == PINNED


PINNED = 198029047186657508843027917565311465648


@settings(deadline=None, max_examples=30)
@given(st.lists(DIGESTS, min_size=1, max_size=50))
def test_words_sum_exactly_as_floats(digests):
    columns = np.array([words(digest) for digest in digests], dtype=np.float64).sum(0)
    assert from_words([round(value) for value in columns]) == sum(digests) % 2**128


def test_the_budget_ends_a_run_that_skips_too_much():
    ledger = Ledger()
    ledger.add(0, {}, 3)
    ledger.check_budget(3)
    ledger.add(0, {}, 1)
    with pytest.raises(DataError, match=r"data.skip_budget: the run skipped 4 slices .* more than 3"):
        ledger.check_budget(3)


def test_an_empty_ledger_has_no_shares():
    assert Ledger().shares == {} and Ledger().text == "0" * 32
