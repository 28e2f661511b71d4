"""Whatever the documents: nothing is lost or doubled, and any stop and any topology gives the same rows."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import Texts, encode_letters

from megaroute.data.lanes import Lane
from megaroute.data.packing import BestFit, Concat, Packing
from megaroute.data.rows import PADDING, LaneState, Opened, Row

pytestmark = pytest.mark.data

DOCUMENT = st.one_of(
    st.just(""),
    st.characters(codec="utf-8"),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.integers(20, 80).map(lambda count: "longer than a row " * (count // 17)),
)
SHARD = st.lists(DOCUMENT, min_size=1, max_size=8)
CORPUS = st.lists(SHARD, min_size=1, max_size=4)
MIXTURE = st.lists(st.tuples(CORPUS, st.sampled_from([0.1, 0.25, 1.0, 3.0])), min_size=1, max_size=3)
LANES = st.integers(1, 9)
LENGTH = st.integers(2, 25)
PACKING: st.SearchStrategy[Packing] = st.one_of(st.just(Concat()), st.integers(1, 6).map(BestFit))
few = settings(deadline=None, max_examples=25)


def make_lanes(
    mixture: list, lanes: int, length: int, packing: Packing, states: dict[int, LaneState] | None = None
) -> list[Lane]:
    sources = [Texts(texts, lanes, f"source {i}", weight) for i, (texts, weight) in enumerate(mixture)]
    return [Lane(v, lanes, length, sources, packing, (states or {}).get(v)) for v in range(lanes)]


def rows_of(machines: list[Lane], first: int, count: int) -> list[Row]:
    return [machines[g % len(machines)].next() for g in range(first, first + count)]


@few
@given(CORPUS, LANES, LENGTH, PACKING)
def test_every_document_of_an_epoch_is_used_exactly_once(corpus, lanes, length, packing):
    tokens = sum(len(text) + 1 for shard in corpus for text in shard)
    machines = make_lanes([(corpus, 1.0)], lanes, length, packing)
    parts: dict[tuple[int, int, int], list] = defaultdict(list)
    # Every lane goes on until its text is that of a later epoch: then nobody has any of the first one left.
    for machine in machines:
        for _ in range(4 * tokens):
            row = machine.next()
            at = 0
            for span in row.spans:
                ids = row.ids[at : at + span.tokens].tolist()
                at += span.tokens
                if span.epoch == 0:
                    parts[span.shard, span.document].append((span.offset, ids))
            if row.spans[0].epoch > 0:  # a row begins with the oldest document at hand
                break
    whole = {place: [i for _, ids in sorted(found) for i in ids] for place, found in parts.items()}
    expected = {(s, d): encode_letters(text) for s, shard in enumerate(corpus) for d, text in enumerate(shard)}
    assert whole == expected


@few
@given(MIXTURE, LANES, LENGTH, PACKING, st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_any_number_of_stops_changes_nothing(mixture, lanes, length, packing, segments):
    total = sum(segments)
    whole = rows_of(make_lanes(mixture, lanes, length, packing), 0, total)
    found: list[Row] = []
    states: dict[int, LaneState] = {}
    for count in segments:
        part = rows_of(make_lanes(mixture, lanes, length, packing, states), len(found), count)
        states |= {row.lane: row.state for row in part}
        found += part
    for expected, row in zip(whole, found, strict=True):
        assert np.array_equal(row.ids, expected.ids)
        assert (row.sample, row.spans, row.state, row.digest) == (
            expected.sample,
            expected.spans,
            expected.state,
            expected.digest,
        )


@few
@given(MIXTURE, LANES, LENGTH, PACKING)
def test_spans_say_what_rows_hold_and_the_rest_is_padding(mixture, lanes, length, packing):
    texts = {f"source {i}": corpus for i, (corpus, _) in enumerate(mixture)}
    for row in rows_of(make_lanes(mixture, lanes, length, packing), 0, 3 * lanes):
        ids = []
        for span in row.spans:
            document = encode_letters(texts[span.source][span.shard][span.document])
            ids += document[span.offset : span.offset + span.tokens]
        assert row.filled == len(ids) and row.ids.tolist() == ids + [PADDING] * (length - len(ids))
        if isinstance(packing, Concat):
            assert len(ids) == length
            assert sum(at.taken for at in row.state.sources.values()) == row.state.made * length


@few
@given(MIXTURE, LENGTH, PACKING)
def test_shares_are_held_to_a_row_of_each_source(mixture, length, packing):
    total_weight = sum(weight for _, weight in mixture)
    (lane,) = make_lanes(mixture, 1, length, packing)
    for _ in range(40):
        taken = {name: at.taken for name, at in lane.next().state.sources.items()}
        for i, (_, weight) in enumerate(mixture):
            share = weight / total_weight * sum(taken.values())
            assert abs(taken[f"source {i}"] - share) <= len(mixture) * length


@few
@given(MIXTURE, LENGTH, st.integers(1, 6))
def test_best_fit_cuts_only_what_is_longer_than_a_row_and_lets_nobody_wait_for_ever(mixture, length, window):
    (lane,) = make_lanes(mixture, 1, length, BestFit(window))
    texts = {f"source {i}": corpus for i, (corpus, _) in enumerate(mixture)}
    lengths = {
        (name, s, d): len(text) + 1
        for name, corpus in texts.items()
        for s, shard in enumerate(corpus)
        for d, text in enumerate(shard)
    }
    held: dict[Opened, int] = {}
    for _ in range(30):
        row = lane.next()
        for span in row.spans:
            total = lengths[span.source, span.shard, span.document]
            assert span.offset % length == 0 and span.tokens == min(length, total - span.offset)
        (name,) = {span.source for span in row.spans}
        assert sum(place.source == name for place in row.state.open) <= window
        # Before it is its turn to begin a row, at most those that were there before it begin, and fill, theirs.
        held = {place: held.get(place, 0) + (place.source == name) for place in row.state.open}
        assert all(waited <= window * -(-max(lengths.values()) // length) for waited in held.values())
