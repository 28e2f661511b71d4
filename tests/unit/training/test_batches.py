"""Rows of a step: their numbers without any message, and how they are cut."""

import numpy as np
import pytest
import torch

from megaroute.data.stream import open_stream
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import Groups
from megaroute.platform import device
from megaroute.training.batches import cut, iterators, sample_numbers


def groups_of(data_rank: int, data: int) -> Groups:
    return Groups(ParallelDims(1, data, 1), data_rank, 0, data_rank, 0, None)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_numbers_agree_with_the_stream_of_each_replica(tiny, replicas):
    data = tiny().data
    for rank in range(replicas):
        stream = open_stream(data, "train", rank, replicas)
        samples = 0
        for rows in (4, 2, 6):  # a growing or shrinking batch changes nothing
            batch = stream.take(rows)
            assert np.array_equal(batch.samples, sample_numbers(samples, rows, groups_of(rank, replicas)))
            samples += rows * replicas
        stream.close()


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_out_the_global_batch(replicas):
    shares = [sample_numbers(100, 8 // replicas, groups_of(rank, replicas)) for rank in range(replicas)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(100, 108))


def test_cut_gives_every_micro_batch_its_rows_targets_and_context(tiny):
    config = tiny("train.micro_batch=2")
    stream = open_stream(config.data, "train")
    batch = stream.take(6)
    micros = cut(config, device.resolve("cpu"), batch, batch.samples, step=7, budget_scale=0.25)
    assert len(micros) == 3
    tokens = torch.cat([micro.tokens_BS for micro in micros])
    labels = torch.cat([micro.labels_BS for micro in micros])
    assert tokens.shape == labels.shape == (6, 32) and tokens.dtype == labels.dtype == torch.int64
    assert torch.equal(tokens, torch.from_numpy(batch.ids[:, :-1].astype(np.int64)))
    assert torch.equal(labels, torch.from_numpy(batch.ids[:, 1:].astype(np.int64)))
    for index, micro in enumerate(micros):
        routing = micro.info.routing
        assert routing.samples_B.tolist() == batch.samples[2 * index : 2 * index + 2].tolist()
        assert (routing.seed, routing.step, routing.budget_scale) == (config.train.seed, 7, 0.25)
    assert len({id(micro.info.routing.records) for micro in micros}) == 3
    stream.close()


def test_starts_of_documents_go_to_the_layers_where_attention_stays_within(tiny):
    config = tiny("train.micro_batch=2", "data.attend_across_documents=false")
    stream = open_stream(config.data, "train")
    batch = stream.take(6)
    stream.close()
    micros = cut(config, device.resolve("cpu"), batch, batch.samples, step=0)
    starts = torch.cat([micro.info.starts_SB for micro in micros], 1)
    assert starts.dtype == torch.int32 and starts.is_contiguous()
    assert torch.equal(starts.T, torch.from_numpy(batch.starts))
    across = cut(tiny(), device.resolve("cpu"), batch, batch.samples, step=0)
    assert all(micro.info.starts_SB is None for micro in across)


def test_a_stage_that_reads_no_tokens_gets_the_same_context(tiny):
    config = tiny("train.micro_batch=2")
    micros = cut(config, device.resolve("cpu"), None, np.arange(10, 14), step=0)
    assert [micro.info.routing.samples_B.tolist() for micro in micros] == [[10, 11], [12, 13]]
    assert all(micro.tokens_BS is None and micro.labels_BS is None for micro in micros)


def test_every_chunk_of_the_interleaved_schedule_reads_all_micro_batches(tiny):
    micros = cut(tiny(), device.resolve("cpu"), None, np.arange(8), step=0)
    assert list(iterators(micros, 1)) == micros
    chunks = iterators(micros, 3)
    assert [list(chunk) for chunk in chunks] == [micros] * 3
