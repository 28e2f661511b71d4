"""Best-fit packing: whole documents, the longest that fits, and the end of a row left empty."""

import numpy as np
import pytest
from streams import run_replicas
from texts import Texts

from megaroute.common.errors import DataError
from megaroute.data.lanes import Lane
from megaroute.data.packing import BestFit, Piece
from megaroute.data.rows import PADDING
from megaroute.data.stream import open_stream

pytestmark = pytest.mark.data


@pytest.mark.parametrize(
    ("left", "space", "expected"),
    [
        ([3, 9, 4], 10, Piece(0, 3)),  # an empty row begins with the oldest
        ([25, 9], 10, Piece(0, 10)),  # and with as much of it as there is room for
        ([3, 9, 4], 5, Piece(2, 4)),  # then the longest that fits
        ([4, 2, 4], 5, Piece(0, 4)),  # of equals the oldest
        ([5, 5], 5, Piece(0, 5)),
        ([6, 12], 5, None),  # nothing is cut to fill a rest
    ],
)
def test_who_comes_next(left, space, expected):
    assert BestFit(4).next_piece(left, space, 10) == expected


def test_rows_of_a_lane():
    """One slice of documents of 8, 4, 7, 3 and 2 tokens in its reading order, rows of 10."""
    texts = [["a" * 7, "b" * 3, "c" * 6, "d" * 2, "e"]]
    source = Texts(texts, lanes=1)
    source.order.documents = lambda place: (place, 0, np.arange(5))
    lane = Lane(0, 1, 10, [source], BestFit(3))
    rows = [lane.next() for _ in range(3)]
    letters = ["".join(chr(i) if i else "." for i in row.ids[: row.filled].tolist()) for row in rows]
    # a leaves 2, too few for b, c and d, which are at hand then; b takes in d, and e, which came for it; for c there is
    # nothing but documents of the next slice, too long.
    assert letters == ["aaaaaaa.", "bbb.dd.e.", "cccccc."]
    assert all((row.ids[row.filled :] == PADDING).all() for row in rows)


def test_batches_say_which_targets_are_real(data):
    stream = open_stream(data.model_copy(update={"packing": "best_fit"}), "train")
    batch = stream.take(40)
    stream.close()
    assert batch.targets.dtype == np.int64 and 0 < batch.targets.min() < batch.targets.max() <= 32
    assert sum(batch.tokens.values()) == batch.targets.sum() + 40
    for ids, starts, targets in zip(batch.ids, batch.starts, batch.targets, strict=True):
        assert (ids[targets + 1 :] == PADDING).all()
        assert (starts[targets + 1 :] == targets + 1).all()  # padding is a document by itself


def test_it_cuts_fewer_documents_and_a_larger_window_pads_less(data):
    def of(**change) -> tuple[int, float]:
        rows, _ = run_replicas(data.model_copy(update=change), 1, [240])
        cut = sum(span.offset > 0 for row in rows.values() for span in row.spans)
        return cut, 1 - sum(row.filled for row in rows.values()) / (33 * len(rows))

    concat, one, many = of(), of(packing="best_fit", packing_window=1), of(packing="best_fit", packing_window=16)
    assert concat[1] == 0 < many[1] < one[1] / 2
    assert many[0] < concat[0]


def test_packing_and_window_are_part_of_the_identity_and_may_change_without_losing_text(data):
    """Documents at hand are used by the other packing too: nothing is lost or doubled."""
    rows, cursor = run_replicas(data.model_copy(update={"packing": "best_fit"}), 1, [40])
    for change in ({}, {"packing": "best_fit", "packing_window": 8}):
        with pytest.raises(DataError, match=r"data\.packing: .* best_fit of 16 documents, this run has "):
            open_stream(data.model_copy(update=change), "train", cursor=cursor)
    more, after = run_replicas(data.model_copy(update={"allow_change": ("packing",)}), 2, [200], cursor)
    assert [change.field for change in after.changes] == ["packing"]
    parts: dict[tuple, list[tuple[int, int]]] = {}
    for row in [*rows.values(), *more.values()]:
        for span in row.spans:
            if span.epoch == 0:
                parts.setdefault((span.shard, span.document), []).append((span.offset, span.tokens))
    assert len(parts) == 150
    for found in parts.values():
        edges = np.cumsum([0, *(tokens for _, tokens in sorted(found))])
        assert [offset for offset, _ in sorted(found)] == edges[:-1].tolist()
