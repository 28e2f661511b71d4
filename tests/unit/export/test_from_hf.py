"""A folder of transformers becomes a checkpoint that runs start from, or nothing at all."""

import shutil
from collections import namedtuple

import pytest
import torch
from foreign import save_foreign
from safetensors import safe_open

from megaroute.checkpoint.integrity import verify
from megaroute.checkpoint.layout import resolve
from megaroute.checkpoint.tensors import Tensors
from megaroute.common.errors import CheckpointError
from megaroute.config.load import load_config
from megaroute.evaluation.load import load_run
from megaroute.evaluation.logit_gate import check_export, check_import
from megaroute.export import destination
from megaroute.export.from_hf import from_hf
from megaroute.export.to_hf import to_hf

GIB = 2**30
MEMORY = ("density", "slope")
"""What a router remembers and inference does not need, so that an export has it not."""


@pytest.fixture(scope="module")
def llama(tiny_corpus, tmp_path_factory):
    """A model in files of at most 20 kB.  Not to be changed."""
    return save_foreign(tmp_path_factory.mktemp("foreign") / "llama", tiny_corpus / "tok.model", shard="20KB")


@pytest.fixture(scope="module")
def imported(llama, one_process, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "llama"
    return out, from_hf(llama, out, check_import)


def weights_of(run):
    """Tensors of the newest checkpoint of a run as bytes, without the optimizer's state and routers' memory."""
    tensors = Tensors(resolve(run))
    keys = [info.key for info in tensors if not info.key.startswith("optimizer.") and not info.key.endswith(MEMORY)]
    found = {key: tensors.read(key) for key in keys}
    return {
        key: (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).tolist())
        for key, value in found.items()
    }


def exported_weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def test_computes_what_the_source_computes(imported):
    found = imported[1].found
    assert found["max_difference"] < 1e-5 and found["tokens"] > 100 and found["continuation"] == 24


def test_is_a_run_directory_with_a_checkpoint_of_step_0(imported, tiny_corpus):
    out, done = imported
    verify(out / "checkpoints" / "step-00000000")
    config = load_config(out / "config.yaml")
    assert config == done.config
    assert config.checkpoint.init_from == out and config.train.precision == "fp32"
    assert config.data.tokenizer.read_bytes() == (tiny_corpus / "tok.model").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert load_run(out).step == 0


def test_says_which_tokenizer_a_run_needs(imported, tiny_corpus):
    from megaroute.data.tokenizer import Tokenizer

    sentence = imported[1].tokenizer
    assert Tokenizer(tiny_corpus / "tok.model").fingerprint[:12] in sentence and "300 pieces for 320 rows" in sentence


def test_goes_back_with_the_same_bytes(imported, llama, tmp_path):
    to_hf(imported[0], tmp_path / "back", GIB, None)
    mine, theirs = exported_weights(tmp_path / "back"), exported_weights(llama)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "overrides",
    [
        ["routing.unit=layer"],
        ["routing.unit=separate", "routing.gate=probability", "routing.densities=[0.25,0.5,0.75]"],
        ["train.precision=bf16", "model.tie_embeddings=true", "model.activation=geglu"],
        ["routing.router=mod", "routing.unit=mlp", "model.activation=gelu"],
        ["routing.router=random", "train.seed=77", "data.attend_across_documents=false"],
        ["routing.router=dense", "model.head_dim=12", "model.num_kv_heads=1"],
        ["routing.router=dense", "model.activation=gelu"],
        ["model.qkv_bias=true", "model.qk_norm=true"],
    ],
    ids=" ".join,
)
def test_our_own_exports_come_back_byte_for_byte(start, advance, save, tiny, tmp_path, overrides):
    from megaroute.launch.rundir import prepare_run_directory

    config = tiny(*overrides)
    run = prepare_run_directory(config)
    parts = start(config)
    advance(parts, 1)  # so that norms, routers and biases are not what they begin with
    save(parts)
    to_hf(run, tmp_path / "exported", GIB, None)
    done = from_hf(tmp_path / "exported", tmp_path / "back", check_import)
    assert weights_of(tmp_path / "back") == weights_of(run)
    assert done.config.units == config.units
    assert done.config.routing.targets(4) == config.routing.targets(4)
    to_hf(tmp_path / "back", tmp_path / "again", GIB, None)
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "exported" / file).read_bytes(), file


@pytest.mark.parametrize("kind, key", [("qwen2", "qkv_bias"), ("qwen3", "qk_norm")])
@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
def test_relatives_of_llama_keep_their_biases_and_norms(one_process, tiny_corpus, tmp_path, kind, key, routed):
    source = save_foreign(tmp_path / "source", tiny_corpus / "tok.model", kind, tie_word_embeddings=True)
    done = from_hf(source, tmp_path / "out", check_import, routed)
    assert done.found["max_difference"] < 1e-5 and getattr(done.config.model, key)
    back = to_hf(tmp_path / "out", tmp_path / "back", GIB, check_export)
    assert back.class_name == ("MegarouteForCausalLM" if routed or kind == "qwen2" else "Qwen3ForCausalLM")
    mine, theirs = exported_weights(tmp_path / "back"), exported_weights(source)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(".routers." in name for name in mine.keys() - theirs.keys())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_keep_their_bits(one_process, tiny_corpus, tmp_path, dtype):
    source = save_foreign(tmp_path / "source", tiny_corpus / "tok.model", "mistral", dtype, sliding_window=48)
    done = from_hf(source, tmp_path / "out", check_import)
    assert done.config.data.sequence_length == 48, "beyond its window a token would see more than in the source"
    assert done.config.train.precision == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    to_hf(tmp_path / "out", tmp_path / "back", GIB, None)
    mine, theirs = exported_weights(tmp_path / "back"), exported_weights(source)
    assert all(mine[name].dtype == dtype and torch.equal(mine[name], theirs[name]) for name in theirs)


def test_other_logits_are_refused_and_nothing_is_left(llama, one_process, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")

    def damage_and_check(folder, found):
        file = next(file for file in source.glob("*.safetensors") if b"lm_head" in file.read_bytes()[:2000])
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1  # a weight by a factor
        file.write_bytes(raw)
        return check_import(folder, found)

    with pytest.raises(CheckpointError, match="logits differ from its source's by .* nothing was written"):
        from_hf(source, tmp_path / "out", damage_and_check)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_full_disk_is_refused(monkeypatch, llama, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage(GIB, GIB - 1000, 1000))
    with pytest.raises(destination.OutputError, match="needs 0.06 GiB and its disk has 0.00 GiB free"):
        from_hf(llama, tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []
