"""Configuration -> DeepSpeed's argv and environment."""

import sys

import pytest

from megaroute.common.errors import LaunchError
from megaroute.config.load import load_config
from megaroute.launch import command
from megaroute.launch.command import Launch, local_launch, num_processes

CONFIG = """
run: {name: x}
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128, vocab_size: 256}
data: {train: t, tokenizer: t.model}
train: {steps: 10, global_batch: 8}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "with space" / "run.yaml"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    "overrides, nproc, expected",
    [
        ([], None, 1),
        (["parallel.tensor=2", "parallel.pipeline=2"], None, 4),
        (["parallel.tensor=2", "parallel.data=3"], None, 6),
        (["parallel.tensor=2"], 8, 8),
    ],
)
def test_number_of_processes(config_file, overrides, nproc, expected):
    assert num_processes(load_config(config_file, overrides), nproc) == expected


def test_cpu_launch_runs_the_ranks_entry_on_the_given_file(config_file, monkeypatch):
    monkeypatch.setattr(command, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch = local_launch(config_file, 4, "cpu")
    assert launch.argv[:3] == (sys.executable, "-m", "deepspeed.launcher.runner")
    at = launch.argv.index("--module")
    assert launch.argv[at:] == ("--module", "megaroute.cli", "pretrain", str(config_file), "run.device=cpu")
    assert launch.argv[launch.argv.index("--num_accelerators") + 1] == "4"
    assert launch.variables["OMP_NUM_THREADS"] == "2"
    assert launch.variables["DS_ACCELERATOR"] == "cpu"


def test_deepspeed_accepts_the_arguments(config_file):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    parsed = runner.parse_args(list(local_launch(config_file, 4, "cpu").argv[3:]))
    assert (parsed.num_gpus, parsed.module, parsed.no_local_rank) == (4, True, True)
    assert parsed.user_script == "megaroute.cli"
    assert parsed.user_args == ["pretrain", str(config_file), "run.device=cpu"]


def test_more_processes_than_cores_get_one_thread_each(config_file, monkeypatch):
    monkeypatch.setattr(command, "_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert local_launch(config_file, 4, "cpu").variables["OMP_NUM_THREADS"] == "1"


def test_threads_chosen_by_the_user_stay(config_file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local_launch(config_file, 4, "cpu").environment()["OMP_NUM_THREADS"] == "3"


def test_variables_of_another_launcher_do_not_reach_the_ranks(config_file, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("SLURM_PROCID", "0")
    environment = local_launch(config_file, 1, "cpu").environment()
    assert "RANK" not in environment
    assert "SLURM_PROCID" not in environment


def test_devices_are_given_by_number_so_that_a_choice_of_the_user_holds(config_file, monkeypatch):
    monkeypatch.setattr(command, "device_ids", lambda: ["2", "3", "5"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    launch = local_launch(config_file, 2, "cuda")
    assert launch.argv[launch.argv.index("--include") + 1] == "localhost:2,3"
    assert "CUDA_VISIBLE_DEVICES" not in launch.environment()


@pytest.mark.parametrize(
    "ids, sentence",
    [(["0"], "the run needs 2 processes, one per device, but this machine shows 1"), (["GPU-1f", "GPU-2e"], "numbers")],
)
def test_devices_that_do_not_do_are_refused(config_file, monkeypatch, ids, sentence):
    monkeypatch.setattr(command, "device_ids", lambda: ids)
    with pytest.raises(LaunchError, match=sentence):
        local_launch(config_file, 2, "cuda")


def test_shell_line_quotes_and_shows_variables(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    line = Launch(("python", "a b.py"), {"DS_ACCELERATOR": "cpu", "RANK": None}).shell_line()
    assert line == "env -u RANK DS_ACCELERATOR=cpu python 'a b.py'"
