"""A checkpoint becomes DeepSpeed's universal format, or nothing at all.

An engine that loads it is in tests/distributed/test_universal.py.
"""

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import save_foreign

from megaroute.checkpoint.layout import MARKER, resolve
from megaroute.checkpoint.tensors import Tensors
from megaroute.common.errors import CheckpointError, UserError
from megaroute.export import destination
from megaroute.export import to_universal as module
from megaroute.export.from_hf import from_hf
from megaroute.export.to_universal import STATES, to_universal

LAYER = "decoder.layers.1."


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "universal"
    return out, to_universal(trained_run, out)


def read(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def test_every_parameter_has_its_state_and_step(exported, trained_run):
    out, done = exported
    assert (done.tag, done.step) == ("global_step12", 12)
    assert {path.name for path in out.iterdir()} == {"global_step12", "latest", "latest_universal"}
    assert (out / "latest_universal").read_text() == (out / "latest").read_text() == "global_step12"
    tensors = Tensors(resolve(trained_run))
    zero = out / "global_step12" / "zero"
    names = {info.key for info in tensors if not info.key.startswith("optimizer.") and ".state." not in info.key}
    assert {path.name for path in zero.iterdir()} == names | {"optimizer_state.pt"} and len(names) == done.parameters
    size = 0
    for name in names:
        assert {file.name for file in (zero / name).iterdir()} == {"step.pt", *(f"{state}.pt" for state in STATES)}
        assert read(zero / name / "step.pt") == 12.0
        for file, state in STATES.items():
            value = read(zero / name / f"{file}.pt")["param"]
            assert torch.equal(value, tensors.read(f"optimizer.state.{state}.{name}"))
            size += value.nbytes
    assert size == done.bytes


def test_masters_are_exported_and_not_the_16_bit_weights(start, advance, save, tiny, tmp_path):
    parts = start(tiny("train.precision=bf16"))
    advance(parts, 2)
    save(parts)
    to_universal(tmp_path / "run", tmp_path / "out")
    weights = dict(parts.chunks[0].named_parameters())
    zero = tmp_path / "out" / "global_step2" / "zero"
    for name, weight in weights.items():
        master = read(zero / name / "fp32.pt")["param"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight)
    assert any(not torch.equal(read(zero / n / "fp32.pt")["param"], w.float()) for n, w in weights.items())


def test_skipped_steps_are_not_in_the_step_of_the_moments(start, advance, save, tiny, tmp_path):
    parts = start(tiny())
    advance(parts, 2)
    parts.stream.take(8)
    parts.state.advance(8, 32, skipped=True)
    save(parts)
    done = to_universal(tmp_path / "run", tmp_path / "out")
    assert (done.tag, done.step) == ("global_step3", 2)
    client = read(tmp_path / "out" / "global_step3" / "mp_rank_00_model_states.pt")
    assert (client["global_steps"], client["skipped_steps"]) == (3, 1)
    assert client["lr_scheduler"] == {"last_batch_iteration": 2}


AXES = {
    "embedding.word_embeddings.weight": 0,
    f"{LAYER}self_attention.linear_q.weight": 0,
    f"{LAYER}self_attention.linear_kv.weight": 0,
    f"{LAYER}self_attention.linear_proj.weight": 1,
    f"{LAYER}mlp.linear_fc2.weight": 1,
    f"{LAYER}input_layernorm.weight": None,
    f"{LAYER}units.layer.router.weight": None,
}
FC1 = f"{LAYER}mlp.linear_fc1.weight"


def slice_of(name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
    """What tensor rank `rank` of two holds of a parameter."""
    if name == FC1:  # gate and up, one below the other
        return torch.cat([part.chunk(2)[rank] for part in whole.chunk(2)])
    return whole if AXES[name] is None else whole.chunk(2, dim=AXES[name])[rank].contiguous()


def loaded(folder: Path, shape: torch.Size, rank: int) -> dict[str, torch.Tensor]:
    """What DeepSpeed's loader gives tensor rank `rank` of two, whose parameter has `shape`."""
    from deepspeed.checkpoint.universal_checkpoint import enable_universal_checkpoint
    from deepspeed.utils.tensor_fragment import fragment_address

    parameter: Any = torch.nn.Parameter(torch.zeros(shape))
    master = torch.zeros(parameter.numel())
    whole = fragment_address(numel=parameter.numel(), start=0)
    parameter._hp_mapping = SimpleNamespace(lp_fragment_address=whole, get_hp_fragment=lambda: master)
    enable_universal_checkpoint([parameter])
    assert parameter.load_hp_checkpoint_state(str(folder), rank, 2) == 12.0
    return {"fp32": master.view(shape), **{k: v.view(shape) for k, v in parameter._hp_mapping.optim_fragment.items()}}


@pytest.mark.parametrize("name", [*AXES, FC1])
def test_tensor_ranks_get_their_slices_and_put_them_together_again(exported, tmp_path, name):
    from deepspeed.checkpoint.ds_to_universal import dump_param_fragment, merge_tp_slices

    step = exported[0] / "global_step12"
    kept = [read(step / "zero" / name / f"{state}.pt") for state in STATES]
    for rank in range(2):
        shape = slice_of(name, kept[0]["param"], rank).shape
        found = loaded(step / "zero" / name, shape, rank)
        for state, whole in zip(STATES, kept, strict=True):
            assert torch.equal(found[state], slice_of(name, whole["param"], rank)), state
            flat = found[state].flatten()
            dump_param_fragment(str(tmp_path / "slices"), rank, 0, state, flat, name, 0, flat.numel())
        dump_param_fragment(str(tmp_path / "slices"), rank, 0, "step", 12.0, name, 0, 1)
    info = read(step / "mp_rank_00_model_states.pt")["universal_checkpoint_info"]
    merge_tp_slices(info, str(tmp_path / "merged"), str(tmp_path / "slices"), 2, (name, [shape, shape]))
    for state, whole in zip(STATES, kept, strict=True):
        again = read(tmp_path / "merged" / name / f"{state}.pt")
        assert torch.equal(again.pop("param"), whole.pop("param")) and again == whole


def test_optimizer_groups_beyond_any_engines_are_listed_and_change_nothing(exported):
    state = read(exported[0] / "global_step12" / "zero" / "optimizer_state.pt")
    assert state["param_groups"] == [{}] * exported[1].parameters


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of the trained run, in a folder of its own."""
    return Path(shutil.copytree(trained_run, tmp_path / "source" / "run"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def refused(checkpoint: Path, place: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        to_universal(checkpoint, place / "out")
    assert list(place.iterdir()) == []


def test_what_is_no_checkpoint_is_refused(run, place):
    refused(run.parent / "none", place, "none does not exist; name a run directory")
    refused(run.parent, place, "holds no complete checkpoint")
    (resolve(run) / MARKER).unlink()
    refused(run, place, r"holds no complete checkpoint \(a folder with complete.json\)")


def test_changed_and_cut_files_are_refused(run, place):
    file = next(resolve(run).glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    refused(run, place, "distcp cannot be read .*sha256 differs")
    file.write_bytes(raw[:-1])
    refused(run, place, "distcp cannot be read .* bytes and was written with")


def test_imported_model_without_optimizer_state_is_refused(tiny_corpus, place, tmp_path):
    from_hf(save_foreign(tmp_path / "llama", tiny_corpus / "tok.model"), tmp_path / "imported", None)
    refused(tmp_path / "imported", place, "has no optimizer state .* as an imported model has none")


def test_occupied_and_missing_places_are_refused(run, place):
    (place / "file").touch()
    for out, reason in [(place, "not an empty folder"), (place / "a" / "b", "does not exist, so b cannot")]:
        with pytest.raises(UserError, match=reason):
            to_universal(run, out)
    assert [path.name for path in place.iterdir()] == ["file"]


def test_full_disk_is_refused(monkeypatch, run, place):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 1000, 1000))
    refused(run, place, "needs 0.06 GiB and its disk has 0.00 GiB free")


def test_disk_that_fills_up_leaves_nothing(monkeypatch, run, place):
    def full(value: Any, file: Any) -> None:
        file.write(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    refused(run, place, r"out cannot be written \(No space left on device\); nothing was left there")


def test_groups_at_different_steps_are_refused(monkeypatch, run, place):
    groups = [{"step": 12}, {"step": 11}]
    monkeypatch.setattr(module, "read_common", lambda _: {"optimizer": {"optimizer": {"param_groups": groups}}})
    with pytest.raises(CheckpointError, match=r"groups of the optimizer are at steps \[11.0, 12.0\]"):
        to_universal(run, place / "out")
