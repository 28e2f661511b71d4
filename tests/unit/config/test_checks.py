"""Rules across sections and for the number of processes: each message prints its equation."""

import pytest

from megaroute.common.errors import ConfigError
from megaroute.config.checks import check_config, data_parallel_size

REFUSED = [
    # (overrides, world size, backend, words of the message)
    (["model.num_layers=6", "parallel.pipeline=4"], None, None, "model.num_layers 6 % (parallel.pipeline 4 * "),
    (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], None, None, "parallel.virtual_pipeline 3) = 2, must be 0"),
    (["parallel.virtual_pipeline=2"], None, None, "parallel.virtual_pipeline 2 needs parallel.pipeline > 1"),
    (["parallel.tensor=8"], None, None, "model.num_attention_heads 4 % parallel.tensor 8 = 4"),
    (
        [
            *("parallel.tensor=6", "model.num_attention_heads=12", "model.num_kv_heads=4", "model.head_dim=8"),
            *("model.ffn_hidden_size=96", "model.vocab_size=258"),
        ],
        *(None, None, "model.num_kv_heads 4 % parallel.tensor 6 = 4 and parallel.tensor 6 % model.num_kv_heads 4 = 2"),
    ),
    (
        ["parallel.tensor=8", "model.num_attention_heads=8", "model.num_kv_heads=1", "model.head_dim=6"],
        *(None, None, "(2 * model.num_kv_heads 1 * head width 6) % parallel.tensor 8 = 4, must be 0"),
    ),
    (["parallel.tensor=2", "model.ffn_hidden_size=33"], None, None, "model.ffn_hidden_size 33 % parallel.tensor 2 = 1"),
    (["parallel.tensor=2", "model.vocab_size=257"], None, None, "model.vocab_size 257 % parallel.tensor 2 = 1"),
    (["parallel.sequence=true"], None, None, "parallel.sequence needs parallel.tensor > 1"),
    (
        ["parallel.sequence=true", "parallel.tensor=4", "data.sequence_length=30"],
        *(None, None, "data.sequence_length 30 % parallel.tensor 4 = 2"),
    ),
    (["train.micro_batch=3"], None, None, "train.global_batch 8 % (train.micro_batch 3 * parallel.data 1) = 2"),
    (["parallel.data=3"], None, None, "train.global_batch 8 % (train.micro_batch 1 * parallel.data 3) = 2"),
    ([], 3, None, "train.global_batch 8 % (train.micro_batch 1 * parallel.data 3) = 2"),
    (
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "train.micro_batch=4"],
        *(None, None, "train.global_batch 8 % (train.micro_batch 4 * parallel.data 1 * parallel.pipeline 4) = 8"),
    ),
    (
        ["train.rampup={start: 3, increment: 5, samples: 9}", "train.micro_batch=2"],
        None,
        None,
        "train.rampup.start 3 %",
    ),
    (
        ["train.rampup={start: 2, increment: 3, samples: 9}", "train.micro_batch=2"],
        None,
        None,
        "train.rampup.increment",
    ),
    (["train.rampup={start: 8, increment: 1, samples: 9}"], None, None, "train.rampup.start 8 >= train.global_batch 8"),
    (
        ["train.rampup={start: 2, increment: 4, samples: 9}"],
        None,
        None,
        "(train.global_batch 8 - train.rampup.start 2)",
    ),
    (["data.lanes=10", "parallel.data=4"], None, None, "data.lanes 10 % parallel.data 4 = 2"),
    (["train.validate_every=5", "data.valid="], None, None, "train.validate_every 5 needs data.valid"),
    (
        ["train.validate_every=5", "train.validate_samples=6", "parallel.data=4"],
        *(None, None, "train.validate_samples 6 % (train.micro_batch 1 * parallel.data 4) = 2"),
    ),
    (["routing.layers=[1, 8]"], None, None, "routing.layers has 8, but model.num_layers 8 counts layers 0 to 7"),
    (["routing.layers=[]"], None, None, "no layer carries a router (routing.layers is empty)"),
    (["routing.first_dense=5", "routing.last_dense=3"], None, None, "routing.first_dense 5 + routing.last_dense 3 >= "),
    (["optim.warmup_steps=10"], None, None, "optim.warmup_steps 10 >= train.steps 10"),
    (["optim.decay_steps=4", "optim.warmup_steps=4"], None, None, "optim.decay_steps 4 <= optim.warmup_steps 4"),
    (["optim.min_lr=1e-3"], None, None, "optim.min_lr 0.001 > optim.lr 0.0003"),
    (["optim.decay=inverse_square_root"], None, None, "optim.warmup_steps, which is 0"),
    (["train.precision=fp16"], None, "gloo", "train.precision fp16 is not supported on the CPU"),
    (["parallel.overlap_p2p=true"], None, None, "parallel.overlap_p2p needs the interleaved schedule"),
]

INTERLEAVED = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]


@pytest.mark.parametrize("overrides, world_size, backend, words", REFUSED, ids=lambda value: str(value)[:60])
def test_contradiction_is_refused_with_its_equation(small, overrides, world_size, backend, words):
    with pytest.raises(ConfigError) as refused:
        check_config(small(*overrides), world_size, backend)
    assert len([line for line in str(refused.value).splitlines() if words in line]) == 1


@pytest.mark.parametrize(
    "overrides, world_size, backend",
    [
        ([], None, None),
        ([], 8, "gloo"),
        (["parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=2"], 8, "gloo"),
        (INTERLEAVED, 4, "gloo"),
        ([*INTERLEAVED, "parallel.overlap_p2p=true"], 2, "gloo"),
        (["train.rampup={start: 2, increment: 2, samples: 9}", "parallel.data=2"], 2, "nccl"),
        (["train.precision=fp16"], 1, "nccl"),
        (["train.precision=bf16"], 1, "gloo"),
        (["routing.router=dense", "routing.first_dense=9"], 1, "gloo"),
        (["optim.decay=inverse_square_root", "optim.warmup_steps=1"], 1, "gloo"),
        (["model.num_kv_heads=2", "parallel.tensor=2"], 2, "gloo"),
        (["model.num_kv_heads=2", "parallel.tensor=4"], 4, "gloo"),
        (["model.num_kv_heads=1", "parallel.tensor=2", "parallel.sequence=true"], 2, "gloo"),
        (["parallel.deallocate_pipeline_outputs=true", "parallel.pipeline=2"], 2, "gloo"),
    ],
    ids=str,
)
def test_what_fits_is_accepted(small, overrides, world_size, backend):
    check_config(small(*overrides), world_size, backend)


def test_pipeline_outputs_freed_while_gloo_reads_them_are_refused(small):
    overrides = [*INTERLEAVED, "parallel.overlap_p2p=true", "parallel.deallocate_pipeline_outputs=true"]
    with pytest.raises(ConfigError, match=r"set parallel.deallocate_pipeline_outputs=false"):
        check_config(small(*overrides), 2, "gloo")
    check_config(small(*overrides), 2, "nccl")


def test_batched_sends_between_two_interleaved_stages_are_refused(small):
    with pytest.raises(ConfigError, match="gives wrong gradients without an error.*parallel.batch_p2p=false"):
        check_config(small(*INTERLEAVED, "parallel.batch_p2p=true"))
    check_config(small("parallel.pipeline=4", "parallel.virtual_pipeline=2", "parallel.batch_p2p=true"))
    check_config(small("parallel.pipeline=2", "parallel.batch_p2p=true"))


def test_overlapped_and_batched_sends_exclude_each_other(small):
    overrides = ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "parallel.overlap_p2p=true"]
    with pytest.raises(ConfigError, match="exclude each other"):
        check_config(small(*overrides, "parallel.batch_p2p=true"))


def test_every_problem_has_its_line(small):
    with pytest.raises(ConfigError) as refused:
        check_config(small("parallel.tensor=3"))
    lines = str(refused.value).splitlines()
    assert len(lines) == 4
    assert [line.split()[0] for line in lines][:2] == ["model.num_attention_heads", "model.ffn_hidden_size"]


def test_data_parallel_size_fills_the_processes(small):
    assert data_parallel_size(small("parallel.tensor=2", "parallel.pipeline=2"), 12) == 3
    assert data_parallel_size(small("parallel.tensor=2", "parallel.data=4"), 8) == 4


@pytest.mark.parametrize(
    "overrides, world_size, sentence",
    [
        (
            ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=3"],
            8,
            "parallel.tensor 2 * parallel.pipeline 2 * parallel.data 3 = 12, but 8 processes; "
            "set parallel.data=2 or launch 12",
        ),
        (
            ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=3"],
            2,
            "parallel.tensor 2 * parallel.pipeline 2 * parallel.data 3 = 12, but 2 processes; launch 12",
        ),
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            6,
            "parallel.tensor 2 * parallel.pipeline 2 = 4 processes make one replica, but 6 were started, not a "
            "multiple; launch 4 or 8",
        ),
        (
            ["parallel.tensor=2", "parallel.pipeline=2"],
            3,
            "parallel.tensor 2 * parallel.pipeline 2 = 4 processes make one replica, but 3 were started, not a "
            "multiple; launch 4",
        ),
    ],
)
def test_processes_that_do_not_make_replicas_are_refused(small, overrides, world_size, sentence):
    with pytest.raises(ConfigError) as refused:
        data_parallel_size(small(*overrides), world_size)
    assert str(refused.value) == sentence
