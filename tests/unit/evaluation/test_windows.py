"""Windows score every token once, with as much context as was promised."""

import pytest

from megaroute.evaluation.windows import windows


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 12, 13, 40, 41])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_every_token_is_scored_once(length, stride):
    ids, context = list(range(length)), 8
    scored = [token for w in windows(ids, context, stride) for token in w.ids[len(w.ids) - w.scored :]]
    assert scored == ids[1:]


def test_windows_are_full_and_look_back():
    cut = list(windows(list(range(20)), context=8, stride=4, document=3))
    assert [w.ids[0] for w in cut] == [0, 4, 8, 11]  # the last one looks back further, as fewer tokens are left
    assert all(len(w.ids) == 9 for w in cut)
    assert [w.scored for w in cut] == [8, 4, 4, 3]
    assert {w.document for w in cut} == {3}


def test_stride_of_the_context_looks_back_on_one_token():
    cut = list(windows(list(range(17)), context=8, stride=8))
    assert [w.ids for w in cut] == [list(range(9)), list(range(8, 17))]


def test_a_document_without_tokens_still_ends():
    assert [w.ids for w in windows([0, 0], context=8, stride=4)] == [[0, 0]]
