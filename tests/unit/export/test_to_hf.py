"""A checkpoint becomes a folder that transformers loads, or nothing at all."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megaroute.common.errors import CheckpointError, UserError
from megaroute.config.load import load_config
from megaroute.data.tokenizer import Tokenizer
from megaroute.evaluation.logit_gate import check_export
from megaroute.export import destination
from megaroute.export.to_hf import to_hf
from megaroute.launch.rundir import prepare_run_directory

GIB = 2**30


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """The routed model, checked, in files of at most 40 kB."""
    out = tmp_path_factory.mktemp("exported") / "model"
    return out, to_hf(trained_run, out, 40_000, check_export)


@pytest.fixture
def run_of(start, save, tiny):
    """`run_of("a.b=1", ..)`: a run directory with a checkpoint of freshly made weights."""

    def run_of(*overrides: str) -> Path:
        config = tiny(*overrides)
        run = prepare_run_directory(config)
        save(start(config))
        return run

    return run_of


def test_check_finds_the_same_model(exported):
    found = exported[1].found
    assert found["max_difference"] < 1e-5 and found["tokens"] > 100 and found["continuation"] > 0
    assert len(found["density"]) == 3


def test_weights_are_in_small_files_with_an_index(exported):
    out, done = exported
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and exported[1].class_name == "MegarouteForCausalLM"
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    sizes = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {weights[name] for name in opened.keys()} == {file.name}  # noqa: SIM118
            sizes += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert sizes == done.bytes


def test_loads_where_there_is_no_megaroute(exported, tmp_path):
    program = f"""
import sys
sys.modules["megaroute"] = sys.modules["megatron"] = None  # importing either fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(exported[0])!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(exported[0])!r}, trust_remote_code=True)
prompt = tokenizer(["the router reads", "a layer"], padding=True, return_tensors="pt")
print(model.generate(**prompt, max_new_tokens=6, do_sample=False)[:, -6:].tolist())
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": next(p for p in sys.path if Path(p, "torch").is_dir())}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)
    assert [len(row) for row in tokens] == [6, 6] and max(map(max, tokens)) < 300


def test_routers_stay_float32_in_a_16_bit_model(exported):
    model = AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=True, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {weight.dtype for name, weight in model.named_parameters() if ".routers." in name} == {torch.float32}


def test_settings_and_card_say_what_was_trained(exported, trained_run):
    out, _ = exported
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert (config.router, config.routed_layers, config.router_densities) == ("gumbel", [1, 2, 3], [0.5] * 3)
    assert (out / "tokenizer.model").read_bytes() == load_config(
        trained_run / "config.yaml"
    ).data.tokenizer.read_bytes()
    card = (out / "README.md").read_text()
    assert "| optimizer steps | 12 |" in card and "| 3 | 0.500 | 0." in card and "trust_remote_code=True" in card


def test_ids_without_a_piece_are_not_generated(exported):
    model = AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=True)
    with torch.no_grad():
        model.lm_head.weight[300:] = 100 * model.model.norm.weight.sign()
        model.model.norm.weight.fill_(1.0)
    out = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=5, do_sample=True)
    assert int(out.max()) < 300


@pytest.mark.parametrize(
    "overrides, name, why",
    [
        (["routing.router=dense"], "LlamaForCausalLM", None),
        (
            ["routing.router=random_ltd", "model.activation=geglu", "model.tie_embeddings=true"],
            "LlamaForCausalLM",
            None,
        ),
        (["routing.router=dense", "model.qkv_bias=true"], "MegarouteForCausalLM", "it has biases"),
        (["routing.router=dense", "model.qk_norm=true", "model.head_dim=12"], "Qwen3ForCausalLM", None),
        (["routing.router=dense", "model.activation=gelu"], "MegarouteForCausalLM", "has no gate"),
        (["routing.router=dense", "data.attend_across_documents=false"], "MegarouteForCausalLM", "within documents"),
        (["routing.unit=separate", "routing.gate=probability"], "MegarouteForCausalLM", "skip layers"),
        (["train.precision=bf16"], "MegarouteForCausalLM", "skip layers"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_class_is_the_plainest_that_computes_the_model(run_of, tmp_path, overrides, name, why):
    done = to_hf(run_of(*overrides), tmp_path / "out", GIB, check_export)
    assert done.class_name == name and (why or "") in (done.why_not_llama or "")
    assert (tmp_path / "out" / "modeling_megaroute.py").exists() == (name == "MegarouteForCausalLM")
    assert done.found["max_difference"] < 1e-4


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["routing.router=moe", "routing.unit=mlp"], "^routing.router moe: "),
        (["routing.router=mod", "routing.mod.predictor=false", "routing.causal_evaluation=false"], "^routing.mod.pred"),
        (["routing.force=fixed_ratio"], "^routing.force fixed_ratio "),
    ],
)
def test_what_cannot_be_decoded_is_refused(run_of, tmp_path, overrides, reason):
    run = run_of(*overrides)
    with pytest.raises(UserError, match=reason):
        to_hf(run, tmp_path / "out", GIB, check_export)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_logits_are_refused_and_nothing_is_left(trained_run, tmp_path):
    def damage_and_check(source, folder):
        file = folder / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-2] ^= 1  # the last weight of the output matrix, by a factor
        raw[-1] ^= 1
        file.write_bytes(raw)
        return check_export(source, folder)

    with pytest.raises(CheckpointError, match="logits differ from its source's by .* nothing was written"):
        to_hf(trained_run, tmp_path / "out", GIB, damage_and_check)
    assert list(tmp_path.iterdir()) == []


def test_occupied_place_is_refused(trained_run, tmp_path):
    (tmp_path / "file").touch()
    for place, reason in [(tmp_path, "not an empty folder"), (tmp_path / "a" / "b", "does not exist, so b cannot")]:
        with pytest.raises(UserError, match=reason):
            to_hf(trained_run, place, GIB, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_refused(monkeypatch, trained_run, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage(GIB, GIB - 1000, 1000))
    with pytest.raises(UserError, match="needs 0.06 GiB and its disk has 0.00 GiB free"):
        to_hf(trained_run, tmp_path / "out", GIB, None)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_taken(trained_run, tmp_path):
    (tmp_path / "out").mkdir()
    done = to_hf(trained_run, tmp_path / "out", GIB, None)
    assert done.found == {} and "was not checked (`--no-check`)" in (tmp_path / "out" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ours = Tokenizer(load_config(trained_run / "config.yaml").data.tokenizer)
    assert tokenizer("the router")["input_ids"] == [ours.eod, *ours.encode("the router")]
