"""Activation recomputation: the same loss, gradients and decisions, and statistics that are counted once."""

import pytest
import torch
from layers import BATCH, SEQ, assert_close, config_of, context_of, model_of

from megaroute.model.microbatch import micro_batch

CASES = {
    "gumbel": {},
    "attention": {"unit": "attention"},
    "mlp": {"unit": "mlp"},
    "separate": {"unit": "separate"},
    "probability, budget of micro-batches": {"gate": "probability", "budget": {"estimator": "microbatch"}},
    "random": {"router": "random", "unit": "separate"},
    "random_ltd": {"router": "random_ltd"},
    "highway": {"router": "highway"},
    "mod": {"router": "mod", "unit": "separate"},
    "early_exit": {"router": "early_exit", "densities": [0.8, 0.5, 0.3]},
    "moe": {"router": "moe", "unit": "mlp", "moe": {"top_k": 2}},
    "capacity": {"dispatch": {"mode": "capacity"}, "capacity": {"factor": 0.7}},
    "pooled": {"dispatch": {"mode": "capacity"}, "capacity": {"factor": 1.0, "scope": "stage"}, "unit": "separate"},
}


class CountedWrites(dict):
    """Records that know how often each was written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: dict[int, int] = {}

    def __setitem__(self, key, value) -> None:
        self.writes[key] = self.writes.get(key, 0) + 1
        super().__setitem__(key, value)


def train(routing, recompute):
    """Loss, gradients and records of one micro-batch through three layers that route."""
    model = model_of(config_of(num_layers=3, train={"recompute": recompute}, **routing))
    ids = torch.randint(64, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1))
    at = context_of(records=CountedWrites())
    losses = model(ids[:, :-1], None, None, labels=ids[:, 1:], packed_seq_params=micro_batch(SEQ, at))
    losses.mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert None not in gradients.values()
    return losses.detach(), gradients, at.records


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("case", CASES)
def test_recomputation_changes_nothing_and_counts_nothing_twice(case, recompute):
    losses, gradients, records = train(CASES[case], "none")
    again, gradients_again, records_again = train(CASES[case], recompute)
    assert torch.equal(losses, again)
    assert_close(gradients_again, gradients, 1e-6)
    assert list(records) == list(records_again) and len(records) in (3, 6)
    assert set(records_again.writes.values()) == {1}
    for key, record in records.items():
        other = records_again[key]
        assert torch.equal(record.keep_SB, other.keep_SB)
        assert record.rows == other.rows
        assert int(record.attention_pairs) == int(other.attention_pairs)


def test_the_records_were_written_by_routers_that_disagree():
    # Otherwise the comparison above would not notice a layer that read another one's record.
    _, _, records = train({"unit": "separate"}, "full")
    kept = [record.keep_SB for record in records.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])
