"""A new run may start with the weights of another one."""

from dataclasses import replace

import pytest
import torch

from megaroute.checkpoint import layout
from megaroute.checkpoint.layout import resolve
from megaroute.common.errors import CheckpointError
from megaroute.common.files import write_json
from megaroute.training import preflight


def weights_of(parts):
    return {name: value.clone() for name, value in parts.chunks[0].state_dict().items() if value is not None}


@pytest.fixture
def before(start, trained_run):
    """Weights of the run that others start from."""
    from megaroute.config.load import load_config

    return weights_of(start(load_config(trained_run / "config.yaml")))


def test_starts_with_weights_and_router_memory_and_nothing_else(start, advance, snapshot, tiny, trained_run, before):
    parts = start(tiny(f"checkpoint.init_from={trained_run}", "data.seed=5", "data.lanes=4"))
    found = weights_of(parts)
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert any(name.endswith("state.density") for name in found)
    assert (parts.state.step, parts.state.samples, parts.resumed_from) == (0, 0, None)
    assert not any(name.startswith("exp_avg") for name in snapshot(parts) if snapshot(parts)[name].any())
    assert advance(parts, 1)[0].totals.loss < 5, "a model that has learned nothing is at 5.8"


def test_masters_of_16_bit_weights_start_there_too(start, advance, snapshot, tiny, trained_run, before):
    parts = start(
        tiny(f"checkpoint.init_from={trained_run}", "train.precision=bf16", "optim.lr=1e-12", "optim.min_lr=0")
    )
    advance(parts, 1)
    for name, value in weights_of(parts).items():
        if not name.endswith(("density", "bias", "slope")):
            assert torch.equal(value.float(), before[name].to(value.dtype).float()), name


def test_own_checkpoint_comes_first(start, advance, save, tiny, trained_run):
    parts = start(tiny(f"checkpoint.init_from={trained_run}"))
    advance(parts, 1)
    save(parts)
    expected = weights_of(parts)
    again = start(tiny(f"checkpoint.init_from={trained_run}"))
    assert again.resumed_from == 1
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(again).items())


def test_good_start_is_let_through(tiny, trained_run):
    preflight.check(tiny(f"checkpoint.init_from={trained_run}"), 1)
    preflight.check(tiny(f"checkpoint.init_from={resolve(trained_run)}", "checkpoint.resume=false"), 1)


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (["checkpoint.init_from=nowhere"], "^nowhere does not exist"),
        (
            ["model.rope_base=500"],
            "^model.rope_base: checkpoint .* with 10000, this run has 500; .* another checkpoint.in",
        ),
        (["routing.router=dense"], "^routing.router: checkpoint .* was written with gumbel, this run has dense"),
        (["data.tokenizer={corpus}/other.model"], "^data.tokenizer: .* so all text would be other text to them"),
    ],
)
def test_start_that_does_not_fit_is_refused(tiny, trained_run, tiny_corpus, overrides, reason):
    overrides = [override.format(corpus=tiny_corpus) for override in overrides]
    config = tiny(
        f"checkpoint.init_from={trained_run}",
        "data.train=" + str(tiny_corpus / "untied"),
        "data.valid=null",
        *overrides,
    )
    with pytest.raises(CheckpointError, match=reason) as caught:
        preflight.check(config, 1)
    assert "\n" not in str(caught.value)
    assert not config.run_directory.exists()


def test_other_tokenizer_is_allowed_when_said(tiny, trained_run, tiny_corpus):
    data = [f"data.tokenizer={tiny_corpus}/other.model", f"data.train={tiny_corpus}/untied", "data.valid=null"]
    preflight.check(tiny(f"checkpoint.init_from={trained_run}", *data, "data.allow_change=[tokenizer]"), 1)


def test_imported_weights_are_no_run_to_go_on_with(start, save, tiny):
    config = tiny()
    path = save(start(config))
    record = replace(layout.read_run(path), layout=layout.WEIGHTS_ONLY)
    write_json(path / layout.RUN, record.__dict__)
    with pytest.raises(CheckpointError, match="^run.directory: .* no optimizer state, .* checkpoint.init_from="):
        preflight.check(
            config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"verify": "off"})}), 1
        )
