"""Who sends what to whom: a plain function of the counts."""

from hypothesis import given
from hypothesis import strategies as st

from megaroute.routing.exchange import Exchange, Transfer, mean_rows, transfers

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=9)


@given(COUNTS)
def test_transfers_conserve_rows_and_leave_nobody_above_the_mean(counts):
    after = list(counts)
    for transfer in transfers(counts):
        assert transfer.rows > 0
        after[transfer.source] -= transfer.rows
        after[transfer.target] += transfer.rows
    assert sum(after) == sum(counts)
    assert min(after) >= 0 and max(after) <= mean_rows(counts)


@given(COUNTS)
def test_no_row_is_sent_that_could_stay(counts):
    found = transfers(counts)
    # Every rank above the mean must give its surplus away; that alone is the least that can be sent.
    assert sum(t.rows for t in found) == sum(max(count - mean_rows(counts), 0) for count in counts)
    assert not {t.source for t in found} & {t.target for t in found}
    assert len({(t.source, t.target) for t in found}) == len(found)


@given(COUNTS)
def test_ranks_agree_on_slots_and_each_computes_no_more_than_the_mean(counts):
    ranks = [Exchange.of(counts, rank) for rank in range(len(counts))]
    largest = ranks[0].slots // len(counts)
    arriving = [set() for _ in counts]
    for source, exchange in enumerate(ranks):
        assert exchange.slots == ranks[0].slots and exchange.rows == mean_rows(counts)
        assert exchange.own + len(exchange.sent) == counts[source]
        assert exchange.own + len(exchange.received) <= exchange.rows
        for slot in exchange.sent:  # slot (target, i) of the sender is slot (source, i) of the receiver
            arriving[slot // largest].add(source * largest + slot % largest)
    assert [set(exchange.received) for exchange in ranks] == arriving


def test_an_example():
    assert transfers([8, 0, 7, 1]) == [Transfer(0, 1, 4), Transfer(2, 3, 3)]
    assert transfers([10, 1, 1, 4]) == [Transfer(0, 1, 3), Transfer(0, 2, 3)]
    assert transfers([3, 3]) == [] and transfers([0, 0]) == []
    assert mean_rows([3, 2]) == 3 and mean_rows([0, 0]) == 1
