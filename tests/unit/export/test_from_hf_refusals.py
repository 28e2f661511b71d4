"""What cannot be imported is refused by its key or file before anything is written."""

import json
import shutil

import pytest
import torch
from foreign import save_foreign

from megaroute.common.errors import UserError
from megaroute.export.from_hf import from_hf


@pytest.fixture(scope="module")
def llama(tiny_corpus, tmp_path_factory):
    return save_foreign(tmp_path_factory.mktemp("foreign") / "llama", tiny_corpus / "tok.model", shard="20KB")


@pytest.fixture
def source(llama, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(llama, tmp_path / "source")


def assert_refused(source, reason, **options):
    with pytest.raises(UserError, match=reason) as refused:
        from_hf(source, source.parent / "out", None, **options)
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def change(source, **settings):
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"model_type": "gpt2"}, "^model_type 'gpt2' in .*config.json cannot be imported: .* llama, mistral"),
        ({"hidden_act": "relu"}, "^hidden_act 'relu' in .* cannot be imported: the MLP has silu or gelu"),
        ({"attention_bias": True}, "^attention_bias True in "),
        ({"mlp_bias": True}, "^mlp_bias True in "),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "^rope_parameters 'linear' in",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "^rope_scaling 'linear' in "),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}}, "^rope_theta 10000.5 in "),
        ({"quantization_config": {"quant_method": "fp8"}}, "^quantization_config .* dequantise"),
        ({"intermediate_size": 52}, r"has shape \(32, 48\), and by config.json it would be \(32, 52\)"),
        ({"num_hidden_layers": 4}, r"lacks the weights model.layers.3.input_layernorm.weight \(and 8 more\)"),
        ({"num_hidden_layers": 2}, r"has weights model.layers.2.input_layernorm.weight \(and 8 more\) that a model"),
        ({"vocab_size": 310}, r"has shape \(320, 32\), and by config.json it would be \(310, 32\)"),
        ({"num_attention_heads": 5}, "head|divisible|multiple"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_key_that_has_no_counterpart(source, settings, reason):
    change(source, **settings)
    assert_refused(source, reason)


def first_shard(source):
    return min(source.glob("*.safetensors"))


def cut(source):
    file = first_shard(source)
    file.write_bytes(file.read_bytes()[:-1])


def misplace(source):
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.weight"] = first_shard(source).name
    index.write_text(json.dumps(listed))


def widen(source):
    from safetensors.torch import load_file, save_file

    file = first_shard(source)
    save_file({name: value.double() for name, value in load_file(file).items()}, file)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut, "model-00001-of-.* is cut short or no safetensors file"),
        (lambda source: first_shard(source).unlink(), "model-00001-of-.* is not there, though .* names it"),
        (misplace, "model-00001-of-.* lacks model.norm.weight, which .* says is in it"),
        (widen, "has numbers of type F64, and F32, BF16, F16 can be imported"),
        (lambda source: (source / "config.json").unlink(), "is no folder of a Hugging Face model: config.json is not"),
        (lambda source: (source / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda source: (source / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor"),
        (
            lambda source: (source / "tokenizer.model").unlink(),
            "has no tokenizer.model, .* at most 320 pieces with --tok",
        ),
        (
            lambda source: (source / "tokenizer.model").write_bytes(b"x"),
            "source/tokenizer.model is not a sentencepiece model",
        ),
    ],
)
def test_damaged_folder(source, damage, reason):
    damage(source)
    assert_refused(source, reason)


def test_file_outside_of_the_folder_is_not_read(source):
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    name = listed["weight_map"]["model.norm.weight"]
    listed["weight_map"]["model.norm.weight"] = f"../{source.name}/{name}"
    index.write_text(json.dumps(listed))
    assert_refused(source, "is not there, though")


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["model.num_layers=5"], "^model.num_layers=5 would be another model: the source has 3"),
        (["routing.router=gumbel"], "^routing.router=gumbel would be another model: .* --as routed"),
        (["train.steps=0"], "^train.steps is 0"),
    ],
)
def test_override_that_makes_another_model(source, overrides, reason):
    assert_refused(source, reason, overrides=overrides)


def test_occupied_place(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UserError, match="out exists and is not an empty folder"):
        from_hf(source, tmp_path / "out", None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_tokenizer_with_more_pieces_than_rows(tiny_corpus, tmp_path):
    source = save_foreign(tmp_path / "source", tiny_corpus / "tok.model", vocab_size=299)
    assert_refused(source, "has 300 pieces and the model's embedding .vocab_size. 299 rows")


def test_tokenizer_may_be_given_where_the_folder_has_none(one_process, source, tiny_corpus, tmp_path):
    (source / "tokenizer.model").unlink()
    done = from_hf(source, tmp_path / "out", None, tokenizer=tiny_corpus / "tok.model")
    assert "whether its ids are those that the model was trained with is not known" in done.tokenizer
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tiny_corpus / "tok.model").read_bytes()


def test_space_before_a_text_is_switched_off(one_process, tiny_corpus, tmp_path):
    """Tokenizers of Llama and Mistral have `add_dummy_prefix`."""
    from sentencepiece import sentencepiece_model_pb2

    from megaroute.data.tokenizer import Tokenizer

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tiny_corpus / "tok.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "llama.model").write_bytes(proto.SerializeToString())
    source = save_foreign(tmp_path / "source", tmp_path / "llama.model", dtype=torch.bfloat16)
    done = from_hf(source, tmp_path / "out", None)
    mine, plain = Tokenizer(tmp_path / "out" / "tokenizer.model"), Tokenizer(tiny_corpus / "tok.model")
    assert mine.encode("the router") == plain.encode("the router")
    assert "is switched off" in done.tokenizer
