"""A dense model with routers is the dense model in its first step, and skips what it is told to in the end."""

import pytest
import torch
from foreign import save_foreign

from megaroute.common.errors import ConfigError, UserError
from megaroute.config.load import load_config
from megaroute.evaluation.logit_gate import check_import
from megaroute.export.from_hf import from_hf
from megaroute.export.to_hf import to_hf
from megaroute.routing.noise import LARGEST_LOGISTIC, logistic

SOON = ["routing.density_anneal.steps=20", "routing.noise_anneal.steps=20", "routing.first_dense=1"]


@pytest.fixture(scope="module")
def llama(tiny_corpus, tmp_path_factory):
    return save_foreign(tmp_path_factory.mktemp("foreign") / "llama", tiny_corpus / "tok.model")


@pytest.fixture(scope="module")
def dense(llama, one_process, tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "model"
    from_hf(llama, out, None)
    return out


@pytest.fixture
def run_from(start, tiny_corpus, tmp_path):
    """`run_from(imported)`: all parts of a new run of 40 steps that starts with imported weights."""

    def run_from(imported, *overrides):
        data = [f"data.train={tiny_corpus / 'train'}", "data.lanes=8", "data.sequence_length=32"]
        length = ["train.steps=40", "train.global_batch=16", "train.micro_batch=8", "optim.lr=3e-3", "run.device=cpu"]
        place = [f"run.directory={tmp_path / 'run'}", "checkpoint.resume=false"]
        return start(load_config(imported / "config.yaml", [*data, *length, *place, *overrides]))

    return run_from


def test_no_noise_is_larger_than_the_bound():
    largest = logistic(torch.tensor(1 - 2.0**-24))
    assert float(largest) == pytest.approx(LARGEST_LOGISTIC, abs=1e-5)


@pytest.mark.parametrize("unit", ["layer", "separate"])
def test_first_step_is_the_dense_one_and_the_density_falls_to_its_target(
    llama, dense, run_from, advance, tmp_path, unit
):
    done = from_hf(llama, tmp_path / "routed", check_import, True, [*SOON, f"routing.unit={unit}"])
    assert done.found["max_difference"] < 1e-5 and set(done.found["density"]) == {1.0}
    (expected,) = advance(run_from(dense), 1)
    results = advance(run_from(tmp_path / "routed"), 40)
    first, density = results[0].totals, [sum(result.totals.density) / len(done.config.units) for result in results]
    assert results[0].totals.loss == pytest.approx(expected.totals.loss, rel=1e-6)
    assert density[0] == 1.0 and first.density == (1.0,) * len(done.config.units)
    assert sum(density[-8:]) / 8 == pytest.approx(0.5, abs=0.05)
    assert results[-1].totals.loss < expected.totals.loss


def test_whatever_the_noise_at_first_no_token_is_skipped(llama, run_from, advance, tmp_path):
    from_hf(llama, tmp_path / "routed", None, True, [*SOON, "routing.noise_anneal=null"])
    results = advance(run_from(tmp_path / "routed"), 2)
    assert set(results[0].totals.density) == {1.0}


def test_an_upcycled_model_is_exported_and_comes_back(llama, one_process, tmp_path):
    from_hf(llama, tmp_path / "routed", None, True, SOON)
    assert to_hf(tmp_path / "routed", tmp_path / "hf", 2**30, None).class_name == "MegarouteForCausalLM"
    back = from_hf(tmp_path / "hf", tmp_path / "back", check_import, True)
    assert not back.upcycled and back.config.routed_layers == (1, 2)
    with pytest.raises(UserError, match="is a routed model, .* leave --as out"):
        from_hf(tmp_path / "hf", tmp_path / "dense", None, False)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["routing.router=highway"], "^routing.router highway cannot begin as a dense model"),
        (["routing.gate=probability", "routing.benefit=first_order"], "^routing.gate probability multiplies"),
        (["routing.density_anneal=null"], "^routing.density_anneal None does not begin at 1"),
        (["routing.density_anneal.start=0.9"], "^routing.density_anneal .* does not begin at 1"),
        (["routing.first_dense=3"], "no layer carries a router"),
    ],
)
def test_what_would_not_begin_as_the_dense_model_is_refused(llama, tmp_path, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        from_hf(llama, tmp_path / "out", None, True, overrides)
    assert list(tmp_path.iterdir()) == []
