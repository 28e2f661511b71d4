"""Answers for rows of tokens are those of the plain forward pass, whatever rows are beside them."""

import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from layers import model_of

from megaroute.common.errors import CheckpointError, ConfigError
from megaroute.config.routing import RoutingConfig
from megaroute.evaluation.open import open_model
from megaroute.evaluation.scoring import Scorer
from megaroute.model.microbatch import micro_batch
from megaroute.routing.context import RoutingContext


def rows_of(scorer, count=7, seed=0):
    draw = np.random.default_rng(seed)
    return [
        [scorer.tokenizer.eod, *draw.integers(5, 300, draw.integers(1, scorer.context + 1)).tolist()]
        for _ in range(count)
    ]


def other(scorer, model=None, **sections) -> Scorer:
    config = scorer.config.model_copy(update=sections)
    return Scorer(config, scorer.groups, [model] if model else scorer.chunks, scorer.tokenizer, scorer.step)


def test_answers_are_those_of_a_plain_forward_pass(scorer):
    for row, answer in zip(rows_of(scorer), scorer.score(rows_of(scorer), batch=3), strict=True):
        routing = RoutingContext()
        with torch.no_grad():
            packed = micro_batch(len(row) - 1, routing)
            logits = scorer.chunks[0](torch.tensor([row[:-1]]), None, None, packed_seq_params=packed)[0]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")
        np.testing.assert_allclose(answer.nats, expected, rtol=1e-4, atol=1e-5)
        assert answer.likeliest.tolist() == logits.argmax(-1).tolist()
        executed = [routing.records[unit.key].keep_SB[:, 0].tolist() for unit in scorer.config.units]
        assert answer.executed.tolist() == executed


@pytest.mark.parametrize("router", ["gumbel", "random"])
def test_batch_changes_nothing(scorer, router):
    # Random weights skip here and there; a router that draws must draw the same for a row in any batch.
    routing = RoutingConfig(router=router, first_dense=1, init_logit_std=2)
    config = scorer.config.model_copy(update={"routing": routing})
    drawn = other(scorer, model_of(config).eval(), routing=routing)
    rows = rows_of(drawn, 9)
    together, alone = drawn.score(rows, 9), [drawn.score([row], 1)[0] for row in rows]
    assert 0.1 < np.mean([a.executed.mean() for a in alone]) < 0.9
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.nats, b.nats, rtol=1e-4, atol=1e-5)
        assert (a.executed == b.executed).all()


def test_within_documents_the_token_in_front_is_not_seen(scorer):
    data = scorer.config.data.model_copy(update={"attend_across_documents": False})
    within = other(scorer, data=data)
    eod = scorer.tokenizer.eod
    (answer,), (across,) = within.score([[eod, 9, 8, 7]], 1), scorer.score([[eod, 9, 8, 7]], 1)
    assert answer.starts.tolist() == [0, 1, 1] and across.starts.tolist() == [0, 0, 0]
    (alone,) = within.score([[9, 8, 7]], 1)
    np.testing.assert_allclose(answer.nats[1:], alone.nats, rtol=1e-4, atol=1e-5)
    assert np.abs(answer.nats[1:] - across.nats[1:]).max() > 1e-3


def test_layout_that_does_not_fit_is_refused(trained_run):
    with pytest.raises(ConfigError, match=r"model.num_attention_heads 4 % parallel.tensor 3 = 1, must be 0"):
        open_model(trained_run, tensor=3)
    with pytest.raises(ConfigError, match=r"= 2 does not divide 1 processes; launch a multiple of 2"):
        open_model(trained_run, pipeline=2)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_arithmetic_is_that_asked_for_whatever_the_run_had(trained_run, precision, dtype):
    scorer = open_model(trained_run, precision=precision)
    assert {parameter.dtype for parameter in scorer.chunks[0].decoder.parameters()} >= {dtype}
    assert scorer.config.train.precision == precision


def test_wrong_tokenizer_is_refused(copied_run, tiny_corpus):
    shutil.copy(copied_run / "config.yaml", copied_run / "kept")
    config = copied_run / "config.yaml"
    config.write_text(config.read_text().replace("tok.model", "other.model"))
    with pytest.raises(CheckpointError, match=r"data.tokenizer: .*other.model has sha256 .* put that tokenizer back"):
        open_model(copied_run)


def test_routing_that_looks_ahead_is_refused(copied_run):
    config = copied_run / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["routing"] |= {"router": "mod", "causal_evaluation": False}
    values["checkpoint"]["verify"] = "off"  # the record is changed below
    config.write_text(yaml.safe_dump(values))
    record = copied_run / "checkpoints" / "step-00000012" / "run.json"
    record.write_text(
        record.read_text()
        .replace('"gumbel"', '"mod"')
        .replace('"routing.layers"', '"routing.mod.predictor": true, "routing.layers"')
    )
    with pytest.raises(ConfigError, match=r"routing.causal_evaluation is false"):
        open_model(copied_run)


def test_untrained_cost_is_about_that_of_a_guess(scorer):
    config = scorer.config
    fresh = other(scorer, model_of(config).eval())
    nats = np.concatenate([a.nats for a in fresh.score(rows_of(scorer), 4)])
    assert nats.mean() == pytest.approx(math.log(config.model.vocab_size), rel=0.1)
