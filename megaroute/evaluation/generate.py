"""Text generation by the plain full forward pass: one pass over the whole context per token, greedy routing."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from megaroute.common import log
from megaroute.config.units import executed_layers
from megaroute.evaluation.load import Loaded, load_run
from megaroute.model.microbatch import micro_batch
from megaroute.parallel import groups
from megaroute.platform import distributed
from megaroute.routing.context import RoutingContext


def main(run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int) -> int:
    """Print `prompt` and its continuation; on standard error, how many layers the new tokens executed."""
    log.configure()
    try:
        loaded = load_run(run)
        ids, layers = generate(loaded, prompt, tokens, temperature, top_k, seed)
        print(prompt + loaded.tokenizer.decode(ids))
        print(_executed(loaded, layers), file=sys.stderr)
        return 0
    finally:
        groups.tear_down()
        distributed.stop()


@torch.no_grad()
def generate(
    loaded: Loaded, prompt: str, tokens: int, temperature: float, top_k: int | None = None, seed: int = 0
) -> tuple[list[int], list[float]]:
    """At most `tokens` ids after `prompt`, ending early at the end of a document.

    The context starts like a document and keeps the last data.sequence_length tokens.  `temperature` 0 takes the
    likeliest token; `top_k` chooses among the k likeliest.

    Returns:
        (ids, layers that the last context token executed at each of them, attention and MLP half a layer each).
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer, length = loaded.tokenizer, loaded.config.data.sequence_length
    context = [tokenizer.eod, *tokenizer.encode(prompt)]
    ids: list[int] = []
    layers: list[float] = []
    for _ in range(tokens):
        logits_V, executed = _last_logits(loaded, (context + ids)[-length:])
        chosen = choose(logits_V[: tokenizer.vocab_size], temperature, top_k, generator)
        if chosen == tokenizer.eod:
            break
        ids.append(chosen)
        layers.append(executed)
    return ids, layers


def choose(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One id from float32 logits [V]."""
    if temperature == 0:
        return int(logits_V.argmax())
    scaled = logits_V / temperature
    if top_k is not None and top_k < scaled.numel():
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))


def _last_logits(loaded: Loaded, context: list[int]) -> tuple[Tensor, float]:
    """Logits after the last token, float32 [vocabulary] on the CPU, and the layers that it executed."""
    device = loaded.platform.device
    samples_B = torch.zeros(1, dtype=torch.int64, device=device)  # for routers that draw also at inference
    routing = RoutingContext(seed=loaded.config.train.seed, step=loaded.step, samples_B=samples_B)
    tokens = torch.tensor([context], device=device)
    packed = micro_batch(len(context), routing, _document_starts(loaded, context))
    logits_BSV = loaded.model(tokens, None, None, packed_seq_params=packed)
    units = loaded.config.units
    shares = [float(routing.records[unit.key].keep_SB[-1, 0]) for unit in units]
    return logits_BSV[0, -1].float().cpu(), executed_layers(loaded.config.model.num_layers, units, shares)


def _document_starts(loaded: Loaded, context: list[int]) -> Tensor | None:
    """Where the document of each token starts, int32 [S, 1]: an end-of-document token in front belongs to another."""
    if loaded.config.data.attend_across_documents:
        return None
    starts = torch.full((len(context), 1), int(context[0] == loaded.tokenizer.eod), dtype=torch.int32)
    starts[0] = 0
    return starts.to(loaded.platform.device)


def _executed(loaded: Loaded, layers: list[float]) -> str:
    total, mean = loaded.config.model.num_layers, sum(layers) / max(len(layers), 1)
    return f"{len(layers)} tokens, each executed {mean:.2f} of {total} layers on average"
