"""ReCoRD: the prompt, and F1 and exact match by hand."""

import pytest

from megaroute.evaluation import record_task

DOCUMENT = {
    "passage": "Ann met Bob Ray.\n@highlight\nAnn is tall\n@highlight\nBob is not",
    "query": "@placeholder met Ann",
    "entities": ["Ann", "Bob Ray", "the Bob"],
    "answers": ["Bob Ray"],
}


def test_prompt():
    assert record_task.text(DOCUMENT) == "Ann met Bob Ray.\n\n  - Ann is tall.\n  - Bob is not.\n"
    assert record_task.choices(DOCUMENT) == ["  - Ann met Ann", "  - Bob Ray met Ann", "  - the Bob met Ann"]
    assert record_task.target(DOCUMENT) == "  - Bob Ray met Ann"


@pytest.mark.parametrize(
    "best, f1, exact", [(0, 0.0, 0.0), (1, 1.0, 1.0), (2, 2 * 0.5 / 1.5, 0.0)], ids=["wrong", "right", "half"]
)
def test_likeliest_entity_is_judged(best, f1, exact):
    likelihoods = [(-1.0 if i == best else -9.0, False) for i in range(3)]
    assert record_task.scores(DOCUMENT, likelihoods) == {"f1": pytest.approx(f1), "em": exact}


def test_nearest_right_entity_counts():
    document = DOCUMENT | {"answers": ["X", "The bob, ray!"]}
    assert record_task.scores(document, [(-2.0, False), (-1.0, False), (-3.0, False)]) == {"f1": 1.0, "em": 1.0}


def test_answers_without_words_are_equal_to_each_other_alone():
    assert record_task.f1([], []) == 1.0 and record_task.f1(["a"], []) == 0.0
