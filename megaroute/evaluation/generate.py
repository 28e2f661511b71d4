"""Text generation, greedy in its routing."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from megaroute.common import log
from megaroute.evaluation.decoders import Decoder, open_decoder
from megaroute.parallel import groups
from megaroute.platform import distributed


def main(run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int) -> int:
    """Print `prompt` and its continuation; on standard error, how many layers the new tokens executed."""
    log.configure()
    try:
        decoder = open_decoder(run)
        ids, layers = generate(decoder, prompt, tokens, temperature, top_k, seed)
        print(prompt + decoder.tokenizer.decode(ids))
        print(_report(decoder, layers), file=sys.stderr)
        return 0
    finally:
        groups.tear_down()
        distributed.stop()


def generate(
    decoder: Decoder, prompt: str, tokens: int, temperature: float, top_k: int | None = None, seed: int = 0
) -> tuple[list[int], list[float]]:
    """At most `tokens` ids after `prompt`, ending early at the end of a document.

    The context starts like a document.  `temperature` 0 takes the likeliest token; `top_k` chooses among the k
    likeliest.

    Returns:
        (ids, layers that the last context token executed at each of them, attention and MLP half a layer each).
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = decoder.tokenizer
    context = [tokenizer.eod, *tokenizer.encode(prompt)]
    ids: list[int] = []
    layers: list[float] = []
    for _ in range(tokens):
        logits_V, executed = decoder.next(context + ids)
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


def _report(decoder: Decoder, layers: list[float]) -> str:
    mean = sum(layers) / max(len(layers), 1)
    text = f"{len(layers)} tokens, each executed {mean:.2f} of {decoder.num_layers} layers on average"
    size = decoder.cache_size()
    if size is None:
        return text
    text += f"\nkey-value cache: {size.bytes:,} bytes for {size.tokens} tokens"
    if size.effective_layers < size.layers:
        dense = f"a dense model of the same cost per token, {size.effective_layers:g} layers"
        text += f"; {dense}, has {size.effective_bytes:,}"
    return text
