import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaroute.data.order import Order, cut_slices, permutation

pytestmark = pytest.mark.data

PINNED = [2, 0, 7, 1, 4, 5, 6, 3]


def test_permutation_is_pinned():
    """A checkpoint is continued by later versions of numpy and of this package: the order may never change."""
    assert permutation(8, 3, "train", 0).tolist() == PINNED
    assert permutation(8, 3, "train", 1).tolist() != PINNED


@given(st.integers(0, 300), st.integers())
def test_permutation_has_each_number_once(count, key):
    assert sorted(permutation(count, key).tolist()) == list(range(count))


def test_permutation_mixes():
    """Over many keys each number comes first about equally often (mean 50, standard deviation 6.5)."""
    first = np.bincount([permutation(6, key)[0] for key in range(300)], minlength=6)
    assert first.min() > 25 and first.max() < 80


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 64))
def test_slices_cover_each_document_once(documents, at_least):
    slices = cut_slices(documents, at_least)
    covered = [(shard, i) for shard, first, last in slices.tolist() for i in range(first, last)]
    assert covered == [(shard, i) for shard, count in enumerate(documents) for i in range(count)]
    assert len(slices) >= min(at_least, sum(documents))


def test_slices_of_a_large_corpus_stay_few():
    assert len(cut_slices([1000] * 10, 256)) <= 300


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    slices = len(order.slices)
    places = [order.documents(place) for place in range(epoch * slices, (epoch + 1) * slices)]
    assert {found for found, _, _ in places} == {epoch}
    return [(shard, int(number)) for _, shard, numbers in places for number in numbers]


def test_each_epoch_has_each_document_once_in_its_own_order():
    order = Order(cut_slices([7, 5, 20], 12), seed=1, name="train")
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    every = [(shard, i) for shard, count in enumerate([7, 5, 20]) for i in range(count)]
    assert sorted(first) == sorted(second) == every
    assert first != second and first != every


def test_documents_of_a_slice_are_shuffled_anew_each_epoch():
    order = Order(cut_slices([40], 2), seed=1, name="train")
    orders = {tuple(order.documents(place)[2].tolist()) for place in range(2 * 5)}
    assert len(orders) == 10
    assert {tuple(sorted(numbers)) for numbers in orders} == {tuple(range(20)), tuple(range(20, 40))}


def test_order_depends_on_seed_and_name():
    slices = cut_slices([30], 10)
    orders = [Order(slices, seed, name) for seed, name in ((1, "train"), (2, "train"), (1, "valid"))]
    assert len({tuple(epoch_of(order, 0)) for order in orders}) == 3
