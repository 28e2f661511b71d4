"""Choosing a token, and text from a trained checkpoint."""

import importlib.util
import re
from dataclasses import replace

import pytest
import torch
from layers import model_of

from megaroute import cli
from megaroute.common.errors import CheckpointError, ConfigError
from megaroute.config.routing import RoutingConfig
from megaroute.evaluation import generate as generate_module
from megaroute.evaluation.decoders import CachedDecoder, PlainDecoder, open_decoder
from megaroute.evaluation.generate import choose, generate
from megaroute.evaluation.load import load_run
from megaroute.launch.rundir import prepare_run_directory
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


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """The same model as a folder for transformers."""
    pytest.importorskip("transformers", reason="cached decoding wants pip install 'megaroute[export]'")
    from megaroute.export.to_hf import to_hf

    out = tmp_path_factory.mktemp("exported") / "model"
    to_hf(trained_run, out, 2**30, None)
    return out


@pytest.fixture(params=["plain", "cached", "exported"])
def decoder(request, loaded, trained_run):
    """The model read in one of three ways."""
    if request.param == "plain":
        return PlainDecoder(loaded)
    pytest.importorskip("transformers", reason="cached decoding wants pip install 'megaroute[export]'")
    found = open_decoder(request.getfixturevalue("exported") if request.param == "exported" else trained_run)
    assert isinstance(found, CachedDecoder)
    return found


def test_text_is_a_function_of_the_seed(loaded):
    decoder = PlainDecoder(loaded)
    texts = [generate(decoder, PROMPT, 12, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_is_the_argmax_of_the_plain_forward_pass(loaded, decoder):
    ids, layers = generate(decoder, PROMPT, 8, temperature=0)
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
    ids, _ = generate(PlainDecoder(loaded), PROMPT, 20, temperature=0)
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
    assert PlainDecoder(other).next([loaded.tokenizer.eod, 5, 6])[1] == layers


def test_within_documents_a_prompt_is_served_as_it_was_trained(loaded):
    """The logits of a prompt are those of the same text packed behind another document."""
    config = loaded.config.model_copy(
        update={"data": loaded.config.data.model_copy(update={"attend_across_documents": False})}
    )
    text, other = loaded.tokenizer.encode(PROMPT), [5, 6, 7, 8, loaded.tokenizer.eod]
    served, _ = PlainDecoder(replace(loaded, config=config)).next([loaded.tokenizer.eod, *text])
    starts = torch.tensor([0] * 5 + [5] * len(text), dtype=torch.int32)[:, None]
    with torch.no_grad():
        tokens = torch.tensor([[*other, *text]])
        packed = micro_batch(tokens.shape[1], RoutingContext(), starts)
        trained = loaded.model(tokens, None, None, packed_seq_params=packed)[0, -1]
    torch.testing.assert_close(served, trained.float(), rtol=1e-4, atol=1e-4)
    across, _ = PlainDecoder(loaded).next([loaded.tokenizer.eod, *text])
    assert (across - served).abs().max() > 1e-2


def test_full_context_drops_its_first_quarter_and_reads_the_rest_again(loaded, decoder):
    """Whatever is cached, the logits are those of a full forward pass over what is left of the text."""
    if isinstance(decoder, PlainDecoder):
        pytest.skip("it reads the last 32 tokens each time")
    text = [*loaded.tokenizer.encode(PROMPT * 10)][:50]
    for count, kept in [(30, 30), (31, 31), (32, 32), (33, 24), (34, 25), (41, 32), (42, 24)]:
        logits, _ = decoder.next(text[:count])
        expected, _ = PlainDecoder(loaded).next(text[count - kept : count])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert decoder.cache_size().tokens == 24


def test_long_prompt_is_read_from_its_end(loaded, decoder):
    text = loaded.tokenizer.encode(PROMPT * 10)
    expected, _ = PlainDecoder(loaded).next(text[-32:])
    torch.testing.assert_close(decoder.next(text)[0], expected, rtol=1e-4, atol=1e-5)


def test_cache_is_counted_beside_that_of_a_dense_model_of_the_same_cost(decoder):
    generate(decoder, PROMPT, 5, temperature=0)
    size = decoder.cache_size()
    if isinstance(decoder, PlainDecoder):
        assert size is None
        return
    layers = decoder._cache.layers
    assert size.bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert (size.layers, size.effective_layers) == (4, 1 + 3 * 0.5)
    assert size.effective_bytes == round(size.bytes * 2.5 / 4)


def test_end_of_document_ends_the_text(monkeypatch, loaded):
    ends = iter([5, 6, loaded.tokenizer.eod, 7])
    monkeypatch.setattr(generate_module, "choose", lambda *_: next(ends))
    assert generate(PlainDecoder(loaded), PROMPT, 10, temperature=0)[0] == [5, 6]


def test_id_without_a_piece_is_never_chosen(monkeypatch, loaded):
    # The embedding has 320 rows and the tokenizer 300 pieces.
    high = torch.full((320,), -1.0)
    high[310] = 9.0
    monkeypatch.setattr(PlainDecoder, "next", lambda *_: (high, 0))
    ids, _ = generate(PlainDecoder(loaded), PROMPT, 3, temperature=0)
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


@pytest.mark.parametrize("place", ["run", "export"])
def test_command_prints_prompt_text_and_cost(monkeypatch, capsys, request, loaded, trained_run, place):
    # The process group and the logger serve other tests too.
    monkeypatch.setattr(generate_module.groups, "tear_down", lambda: None)
    monkeypatch.setattr(generate_module.distributed, "stop", lambda: None)
    monkeypatch.setattr(generate_module.log, "configure", lambda: None)
    path = request.getfixturevalue("exported") if place == "export" else trained_run
    words = ["generate", str(path), "--prompt", PROMPT, "--tokens", "5", "--temperature", "0"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    ids, layers = generate(PlainDecoder(loaded), PROMPT, 5, temperature=0)
    assert shown.out == PROMPT + loaded.tokenizer.decode(ids) + "\n"
    executed = sum(layers) / 5
    assert f"5 tokens, each executed {executed:.2f} of 4 layers on average" in shown.err
    if importlib.util.find_spec("transformers"):
        assert re.search(r"cache: [\d,]+ bytes for \d+ tokens; a dense model of .*, 2.5 layers, has [\d,]+$", shown.err)


def test_router_that_needs_the_whole_text_is_decoded_without_a_cache(start, save, tiny):
    config = tiny("routing.router=moe", "routing.unit=mlp", "train.steps=1")
    prepare_run_directory(config)
    save(start(config))
    assert isinstance(open_decoder(config.run_directory), PlainDecoder)


def test_other_models_are_not_guessed_at(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(CheckpointError, match="holds a GPT2LMHeadModel, and only Mega"):
        open_decoder(tmp_path)
