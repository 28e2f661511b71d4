import numpy as np
import pytest
from texts import Texts, encode_letters, make_texts

from megaroute.data.lanes import Lane
from megaroute.data.packing import Concat
from megaroute.data.rows import LaneState, Row

pytestmark = pytest.mark.data


def make_lane(
    texts: list[list[str]], number: int, lanes: int, length: int = 10, state: LaneState | None = None
) -> Lane:
    return Lane(number, lanes, length, [Texts(texts, lanes)], Concat(), state)


def rows_of(lane: Lane, count: int) -> list[Row]:
    return [lane.next() for _ in range(count)]


def test_rows_are_the_documents_one_after_another():
    """Concatenated rows are concatenated documents: nothing lost, doubled or padded at row boundaries."""
    texts = make_texts([20, 11])
    rows = rows_of(make_lane(texts, 1, 4), 30)
    begun = [span for row in rows for span in row.spans if span.offset == 0]
    text = [i for span in begun for i in encode_letters(texts[span.shard][span.document])]
    assert np.concatenate([row.ids for row in rows]).tolist() == text[: 30 * 10]


def test_row_numbers_types_and_spans():
    texts = make_texts([20, 11])
    for j, row in enumerate(rows_of(make_lane(texts, 3, 4), 30)):
        assert (row.sample, row.lane, row.state.made) == (j * 4 + 3, 3, j + 1)
        assert row.ids.dtype == np.int32 and row.ids.shape == (10,)
        at = 0
        assert row.document_starts.dtype == np.int32 and row.document_starts.shape == (10,)
        for span in row.spans:
            assert (row.document_starts[at : at + span.tokens] == at).all()
            ids = encode_letters(texts[span.shard][span.document])[span.offset : span.offset + span.tokens]
            assert row.ids[at : at + span.tokens].tolist() == ids
            assert (at in row.starts) == (span.offset == 0)
            at += span.tokens
        assert at == 10


@pytest.mark.parametrize("documents", [[40, 25], [3], [1], [5, 1, 2]], ids=str)
def test_every_token_of_an_epoch_is_read_once(documents):
    """Also where there are fewer documents than lanes: 5 lanes read two whole epochs of each corpus."""
    texts = make_texts(documents)
    seen: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for number in range(5):
        lane = make_lane(texts, number, 5)
        for row in rows_of(lane, 60):
            for span in row.spans:
                seen.setdefault((span.epoch, span.shard, span.document), []).append((span.offset, span.tokens))
    for epoch in (0, 1):
        for shard, count in enumerate(documents):
            for i in range(count):
                parts = sorted(seen[epoch, shard, i])
                edges = np.cumsum([0, *(tokens for _, tokens in parts)]).tolist()
                assert [offset for offset, _ in parts] == edges[:-1]
                assert edges[-1] == len(encode_letters(texts[shard][i]))


@pytest.mark.parametrize("stop", range(1, 26))
def test_a_lane_goes_on_from_the_state_of_any_row(stop):
    """Stops fall inside documents, at their ends, at ends of slices and after the epoch."""
    texts = make_texts([9, 4])
    whole = rows_of(make_lane(texts, 1, 2), 30)
    resumed = make_lane(texts, 1, 2, state=whole[stop - 1].state)
    for expected, found in zip(whole[stop:], rows_of(resumed, 30 - stop), strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert (found.sample, found.spans, found.state) == (expected.sample, expected.spans, expected.state)


def test_a_document_longer_than_a_row_is_continued():
    row, follower = rows_of(make_lane([["x" * 25]], 0, 1), 2)
    assert (row.starts, follower.starts) == ((0,), ())
    assert follower.spans[0].offset == 10
