"""What is refused before anything starts or is written."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megaroute.checkpoint import layout
from megaroute.common.errors import CheckpointError, ConfigError, DataError, LaunchError
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import merge_parts
from megaroute.data.identity import data_identity
from megaroute.data.stream import open_stream
from megaroute.training import preflight

REPOSITORY = Path(__file__).resolve().parents[3]


def write_checkpoint(config, step=2):
    """What preflight reads of a checkpoint of `config`, with a real data cursor and no tensors."""
    path = layout.directory(config.run_directory / "checkpoints", step)
    path.mkdir(parents=True)
    stream = open_stream(config.data, "train")
    samples = step * config.train.global_batch
    stream.take(samples)
    cursor = merge_parts([stream.cursor_part()], samples, data_identity(config.data)).to_json()
    stream.close()
    model = config.model.model_dump(mode="json")
    record = layout.RunRecord(step, samples, 32 * samples, 0, model, routing_shape(config.model, config.routing), "tp1")
    layout.finish(path, record, cursor)
    return path


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_run_is_let_through_and_nothing_is_written(tiny):
    config = tiny("run.directory=" + str(tiny().run_directory / "deep" / "down"))
    preflight.check(config, 1)
    assert not tiny().run_directory.exists()


def test_preflight_needs_no_torch():
    code = "import sys, megaroute.training.preflight; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert shown.stdout == "False\n"


def test_run_directory_below_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        LaunchError, match="^run.directory: .* cannot be made because .*/file is a file; set run"
    ) as caught:
        preflight.check(tiny(f"run.directory={tmp_path / 'file' / 'run'}"), 1)
    one_sentence(caught)


def test_run_directory_in_a_folder_without_permission_is_refused(monkeypatch, tiny, tmp_path):
    real = os.access  # root may write anywhere, so the folder's permissions are told apart here
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    with pytest.raises(LaunchError, match="^run.directory: .*/run cannot be made because .* cannot be written to"):
        preflight.check(tiny(), 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_run_directory_in_a_read_only_folder_is_refused(tiny, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LaunchError, match="cannot be written to"):
            preflight.check(tiny(), 1)
    finally:
        tmp_path.chmod(0o700)


def test_configuration_that_does_not_fit_the_processes_is_refused(tiny):
    with pytest.raises(ConfigError, match="parallel.pipeline 2"):
        preflight.check(tiny("parallel.pipeline=2"), 3)


def test_fp16_is_refused_where_the_run_would_be_on_the_cpu(tiny):
    with pytest.raises(ConfigError, match="train.precision fp16"):
        preflight.check(tiny("train.precision=fp16"), 1)


def test_data_is_checked(tiny, tmp_path):
    with pytest.raises(DataError, match="data.train"):
        preflight.check(tiny(f"data.train={tmp_path / 'nowhere'}"), 1)


def test_own_checkpoint_is_let_through(tiny):
    write_checkpoint(tiny())
    preflight.check(tiny("train.steps=9", "optim.lr=0.1", "train.micro_batch=2"), 1)


def test_resume_false_is_refused_while_there_are_checkpoints(tiny):
    path = write_checkpoint(tiny())
    with pytest.raises(CheckpointError, match="^checkpoint.resume is false, but .* holds checkpoints") as caught:
        preflight.check(tiny("checkpoint.resume=false"), 1)
    assert str(path.parent) in one_sentence(caught)
    (path / layout.MARKER).unlink()
    preflight.check(tiny("checkpoint.resume=false"), 1)


@pytest.mark.parametrize(
    "override, key",
    [
        ("model.hidden_size=64", "model.hidden_size: checkpoint"),
        ("model.rope_base=500", "model.rope_base: checkpoint"),
        ("routing.first_dense=2", "routing.layers: checkpoint"),
        ("routing.router=random", "routing.router: checkpoint"),
        ("data.sequence_length=16", "data.sequence_length: the checkpoint's data cursor"),
        ("data.lanes=4", "data.lanes: the checkpoint's data cursor"),
        ("data.seed=4", "data.seed: the checkpoint's data cursor"),
    ],
)
def test_what_the_checkpoint_cannot_continue_is_refused_with_its_key(tiny, override, key):
    write_checkpoint(tiny())
    with pytest.raises((CheckpointError, DataError)) as caught:
        preflight.check(tiny(override), 1)
    assert one_sentence(caught).startswith(key)


def test_other_tokenizer_than_the_checkpoints_is_refused(tiny, tiny_corpus):
    untied = [f"data.train={tiny_corpus / 'untied'}", "data.valid=null"]
    write_checkpoint(tiny(*untied))
    preflight.check(tiny(*untied), 1)
    with pytest.raises(DataError, match="^data.tokenizer: the checkpoint's data cursor was written for sha256"):
        preflight.check(tiny(*untied, f"data.tokenizer={tiny_corpus / 'other.model'}"), 1)


def test_newest_complete_checkpoint_is_the_one_that_is_checked(tiny):
    write_checkpoint(tiny("model.hidden_size=64"), step=1)
    newest = write_checkpoint(tiny(), step=2)
    preflight.check(tiny(), 1)
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match="model.hidden_size"):
        preflight.check(tiny(), 1)


def test_damaged_checkpoint_is_refused_with_its_file(tiny):
    path = write_checkpoint(tiny())
    record = layout.read_run(path)
    layout.write_json(path / layout.RUN, replace(record, layout="longer than before").__dict__)
    with pytest.raises(CheckpointError, match="run.json cannot be read .*remove its folder") as caught:
        preflight.check(tiny(), 1)
    one_sentence(caught)
