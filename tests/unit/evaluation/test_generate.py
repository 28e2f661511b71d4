"""Choosing a token, and text from a trained checkpoint."""

from dataclasses import replace

import pytest
import torch
from layers import model_of

from megaroute import cli
from megaroute.common.errors import CheckpointError, ConfigError
from megaroute.config.routing import RoutingConfig
from megaroute.evaluation import generate as generate_module
from megaroute.evaluation.generate import choose, generate
from megaroute.evaluation.load import load_run
from megaroute.model.microbatch import micro_batch
from megaroute.routing.context import RoutingContext

PROMPT = "the router reads"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(logits, temperature, top_k=None, count=2000) -> torch.Tensor:
    """Share of each id among `count` choices."""
    source = generator()
    chosen = torch.tensor([choose(logits, temperature, top_k, source) for _ in range(count)])
    return torch.bincount(chosen, minlength=logits.numel()) / count


def test_temperature_0_takes_the_likeliest_and_draws_nothing():
    source = generator()
    before = source.get_state()
    assert choose(torch.tensor([0.1, 3.0, 2.9]), 0, None, source) == 1
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0])
    # Standard error of a share of 2000 draws is at most 0.011.
    torch.testing.assert_close(draws(logits, temperature), (logits / temperature).softmax(-1), atol=0.05, rtol=0)


def test_top_k_leaves_the_k_likeliest_in_their_proportions():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    shares = draws(logits, 1.0, top_k=2)
    assert shares[0] == shares[3] == 0
    torch.testing.assert_close(shares[[1, 2]], torch.tensor([2.0, 1.0]).softmax(-1), atol=0.05, rtol=0)


def test_top_k_of_one_is_greedy_and_one_beyond_the_vocabulary_changes_nothing():
    logits = torch.randn(50, generator=generator(3))
    assert choose(logits, 1.0, 1, generator()) == int(logits.argmax())
    assert [choose(logits, 1.0, k, generator(7)) for k in (50, 99)] == [choose(logits, 1.0, None, generator(7))] * 2


def test_choice_is_a_function_of_the_seed():
    logits = torch.zeros(1000)
    assert choose(logits, 1.0, None, generator(1)) == choose(logits, 1.0, None, generator(1))
    assert choose(logits, 1.0, None, generator(1)) != choose(logits, 1.0, None, generator(2))


@pytest.fixture(scope="module")
def loaded(trained_run):
    return load_run(trained_run)


def test_text_is_a_function_of_the_seed(loaded):
    texts = [generate(loaded, PROMPT, 12, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_is_the_argmax_of_the_plain_forward_pass(loaded):
    ids, layers = generate(loaded, PROMPT, 8, temperature=0)
    assert len(ids) == len(layers) == 8
    context = [loaded.tokenizer.eod, *loaded.tokenizer.encode(PROMPT)]
    for chosen, executed in zip(ids, layers, strict=True):
        routing = RoutingContext()
        with torch.no_grad():
            packed = micro_batch(len(context), routing)
            logits = loaded.model(torch.tensor([context]), None, None, packed_seq_params=packed)[0, -1]
        assert chosen == int(logits[: loaded.tokenizer.vocab_size].argmax())
        assert executed == 1 + sum(int(routing.records[unit].keep_SB[-1, 0]) for unit in (2, 4, 6))  # layers 1 to 3
        context.append(chosen)


def test_model_has_learned_what_its_text_says(loaded):
    # Random weights would give ids of pieces that the corpus hardly has.
    ids, _ = generate(loaded, PROMPT, 20, temperature=0)
    assert set(loaded.tokenizer.decode(ids)) <= set("abcdefghijklmnopqrstuvwxyz ")


@pytest.mark.parametrize(
    "routing, layers",
    [
        ({"router": "dense"}, 4.0),
        ({"unit": "separate", "first_dense": 1, "force": "keep_all"}, 4.0),
        ({"unit": "mlp", "first_dense": 1, "force": "keep_none"}, 1 + 3 * 0.5),
        ({"unit": "layer", "first_dense": 1, "force": "keep_none"}, 1.0),
    ],
)
def test_branches_count_half_a_layer(loaded, routing, layers):
    config = loaded.config.model_copy(update={"routing": RoutingConfig(**routing)})
    other = replace(loaded, config=config, model=model_of(config))
    assert generate_module._last_logits(other, [loaded.tokenizer.eod, 5, 6])[1] == layers


def test_within_documents_a_prompt_is_served_as_it_was_trained(loaded):
    """The logits of a prompt are those of the same text packed behind another document."""
    config = loaded.config.model_copy(
        update={"data": loaded.config.data.model_copy(update={"attend_across_documents": False})}
    )
    text, other = loaded.tokenizer.encode(PROMPT), [5, 6, 7, 8, loaded.tokenizer.eod]
    served, _ = generate_module._last_logits(replace(loaded, config=config), [loaded.tokenizer.eod, *text])
    starts = torch.tensor([0] * 5 + [5] * len(text), dtype=torch.int32)[:, None]
    with torch.no_grad():
        tokens = torch.tensor([[*other, *text]])
        packed = micro_batch(tokens.shape[1], RoutingContext(), starts)
        trained = loaded.model(tokens, None, None, packed_seq_params=packed)[0, -1]
    torch.testing.assert_close(served, trained.float(), rtol=1e-4, atol=1e-4)
    across, _ = generate_module._last_logits(loaded, [loaded.tokenizer.eod, *text])
    assert (across - served).abs().max() > 1e-2


def test_context_keeps_the_last_tokens_that_fit(monkeypatch, loaded):
    contexts = []
    real = generate_module._last_logits

    def spy(model, context):
        contexts.append(context)
        return real(model, context)

    monkeypatch.setattr(generate_module, "_last_logits", spy)
    prompt = PROMPT * 10
    ids, _ = generate(loaded, prompt, 3, temperature=0)
    text = [*loaded.tokenizer.encode(prompt), *ids]
    assert contexts == [text[-32 - left : -left] for left in (3, 2, 1)]


def test_end_of_document_ends_the_text(monkeypatch, loaded):
    ends = iter([5, 6, loaded.tokenizer.eod, 7])
    monkeypatch.setattr(generate_module, "choose", lambda *_: next(ends))
    assert generate(loaded, PROMPT, 10, temperature=0)[0] == [5, 6]


def test_id_without_a_piece_is_never_chosen(monkeypatch, loaded):
    # The embedding has 320 rows and the tokenizer 300 pieces.
    high = torch.full((320,), -1.0)
    high[310] = 9.0
    monkeypatch.setattr(generate_module, "_last_logits", lambda *_: (high, 0))
    ids, _ = generate(loaded, PROMPT, 3, temperature=0)
    assert all(chosen < loaded.tokenizer.vocab_size for chosen in ids)


def test_checkpoint_loads_from_each_of_its_names(trained_run, loaded):
    weights = dict(loaded.model.state_dict())
    for named in (trained_run / "checkpoints", trained_run / "checkpoints" / "step-00000012"):
        again = load_run(named).model.state_dict()
        assert all(torch.equal(weights[name], again[name]) for name in weights if weights[name] is not None)


def test_model_is_in_eval_mode_and_repeats_itself(loaded):
    assert not loaded.model.training
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        first, second = (
            loaded.model(tokens, None, None, packed_seq_params=micro_batch(20, RoutingContext(step=step)))
            for step in (1, 2)  # another step has other noise, of which there is none
        )
    assert torch.equal(first, second)


def test_wrong_tokenizer_is_refused(copied_run, tiny_corpus):
    config = copied_run / "config.yaml"
    config.write_text(config.read_text().replace("tok.model", "other.model"))
    with pytest.raises(CheckpointError, match="^data.tokenizer: .*other.model has sha256 .* put that tokenizer back"):
        load_run(copied_run)


def test_configuration_of_another_model_is_refused(copied_run):
    config = copied_run / "config.yaml"
    config.write_text(config.read_text().replace("ffn_hidden_size: 48", "ffn_hidden_size: 64"))
    with pytest.raises(CheckpointError, match="^model.ffn_hidden_size: checkpoint .* written with 48, this run has 64"):
        load_run(copied_run)


def test_run_without_a_complete_checkpoint_is_refused(copied_run):
    (copied_run / "checkpoints" / "step-00000012" / "complete.json").unlink()
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        load_run(copied_run)


def test_run_without_its_configuration_is_refused(copied_run):
    (copied_run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read: No such file"):
        load_run(copied_run)


def test_place_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; name a run directory"):
        load_run(tmp_path / "nowhere")


def test_command_prints_prompt_text_and_cost(monkeypatch, capsys, loaded, trained_run):
    monkeypatch.setattr(generate_module, "load_run", lambda _: loaded)
    # The process group and the logger serve other tests too.
    monkeypatch.setattr(generate_module.groups, "tear_down", lambda: None)
    monkeypatch.setattr(generate_module.distributed, "stop", lambda: None)
    monkeypatch.setattr(generate_module.log, "configure", lambda: None)
    words = ["generate", str(trained_run), "--prompt", PROMPT, "--tokens", "5", "--temperature", "0"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    ids, layers = generate(loaded, PROMPT, 5, temperature=0)
    assert shown.out == PROMPT + loaded.tokenizer.decode(ids) + "\n"
    executed = sum(layers) / 5
    assert f"5 tokens, each executed {executed:.2f} of 4 layers on average" in shown.err
