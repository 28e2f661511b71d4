"""A token attends within its document: packed documents are computed as if each were alone."""

from itertools import pairwise

import pytest
import torch

from megaroute.data.stream import open_stream
from megaroute.data.tokenizer import Tokenizer
from megaroute.model.microbatch import micro_batch
from megaroute.platform import device
from megaroute.routing.context import RoutingContext
from megaroute.training.batches import Micro, cut

WITHIN = "data.attend_across_documents=false"
LENGTH = "data.sequence_length=160"  # several documents a row
ROWS = 4
KINDS = {
    "dense": ["routing.router=dense"],
    "every token": ["routing.force=keep_all"],
    "layer": [],
    "masked": ["routing.dispatch.mode=masked"],
    "capacity": ["routing.dispatch.mode=capacity", "routing.capacity.factor=2"],
    "separate": ["routing.unit=separate"],
    "attention, recomputed": ["routing.unit=attention", "train.recompute=full"],
    "layer, core recomputed": ["train.recompute=selective"],
    "experts": ["routing.router=moe", "routing.moe.capacity_factor=4"],
}


def micro_of(config) -> Micro:
    """One micro-batch of text, with starts of its documents unless they are attended across."""
    stream = open_stream(config.data, "train")
    batch = stream.take(ROWS)
    stream.close()
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": ROWS})})
    (micro,) = cut(config, device.resolve("cpu"), batch, batch.samples, step=0)
    return micro


def losses_of(model, tokens_BS, labels_BS, starts_SB=None) -> tuple[torch.Tensor, RoutingContext]:
    routing = RoutingContext(seed=1, samples_B=torch.arange(len(tokens_BS)))
    packed = micro_batch(tokens_BS.shape[1], routing, starts_SB)
    return model(tokens_BS, None, None, labels=labels_BS, packed_seq_params=packed), routing


def documents(starts_SB: torch.Tensor) -> list[tuple[int, slice]]:
    """(row, positions) of every document of a micro-batch."""
    found = []
    for row, starts in enumerate(starts_SB.T.tolist()):
        edges = [*sorted(set(starts)), len(starts)]
        found += [(row, slice(*pair)) for pair in pairwise(edges)]
    return found


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(build, tiny, overrides):
    # Noise is drawn by position in the row, where a document is not the same alone.
    config = tiny(WITHIN, LENGTH, "routing.init_logit_std=2", "routing.noise=0", *overrides)
    model, micro = build(config).train(), micro_of(config)
    starts = micro.info.starts_SB
    packed, routing = losses_of(model, micro.tokens_BS, micro.labels_BS, starts)
    packed.sum().backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    assert len(documents(starts)) > 2 * ROWS
    for row, at in documents(starts):
        alone, decided = losses_of(model, micro.tokens_BS[row : row + 1, at], micro.labels_BS[row : row + 1, at])
        for key, record in decided.records.items():
            assert torch.equal(record.keep_SB[:, 0], routing.records[key].keep_SB[at, row])
        torch.testing.assert_close(alone[0], packed[row, at], rtol=1e-5, atol=1e-5)
        alone.sum().backward()
    for name, weight in model.named_parameters():
        scale = float(grads[name].abs().max())
        assert (weight.grad - grads[name]).abs().max() <= 1e-5 * max(scale, 1), name


@pytest.mark.parametrize("overrides", [["routing.router=dense"], []], ids=["dense", "layer"])
def test_documents_are_attended_across_unless_told_otherwise(build, tiny, overrides):
    config = tiny(LENGTH, *overrides)
    model, micro = build(config).eval(), micro_of(config)
    assert micro.info.starts_SB is None
    starts = micro_of(tiny(WITHIN, LENGTH)).info.starts_SB
    with torch.no_grad():
        across, _ = losses_of(model, micro.tokens_BS, micro.labels_BS)
        within, _ = losses_of(model, micro.tokens_BS, micro.labels_BS, starts)
    first = starts.T == 0
    assert torch.allclose(across[first], within[first], atol=1e-5)
    assert ((across - within)[~first].abs() > 1e-4).float().mean() > 0.5


def test_starts_are_those_of_the_documents_in_the_text(tiny):
    config = tiny(WITHIN, LENGTH)
    micro = micro_of(config)
    eod = Tokenizer(config.data.tokenizer).eod
    assert micro.info.starts_SB.dtype == torch.int32 and micro.info.starts_SB.shape == (160, ROWS)
    for row, tokens in enumerate(micro.tokens_BS.tolist()):
        start = 0
        for position, token in enumerate(tokens):
            assert micro.info.starts_SB[position, row] == start
            if token == eod:
                start = position + 1
