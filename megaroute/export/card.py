"""The model card of an exported model."""

from collections.abc import Sequence
from typing import Any

from megaroute import __version__
from megaroute.config.sizes import num_parameters
from megaroute.config.units import executed_layers
from megaroute.export.architecture import OURS, class_name, is_routed
from megaroute.export.source import Source

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- megaroute
---

# {name}

{summary}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(PATH{trust})
model = AutoModelForCausalLM.from_pretrained(PATH{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

The tokenizer puts an end-of-document token before a text, as in training.  `tokenizer.model` is the sentencepiece model
that it was made from.

## Training

| | |
|---|---|
{facts}

## Density
{density}
## Check

{check}
"""


def text(source: Source, class_name: str, found: dict[str, Any]) -> str:
    """Markdown.  `found` is what the check found, empty without one."""
    ours = class_name == OURS
    return TEMPLATE.format(
        name=source.config.run.name,
        summary=_summary(source, ours),
        trust=", trust_remote_code=True" if ours else "",
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(source).items()),
        density=_density(source, found.get("density")),
        check=_check(found),
    )


def _summary(source: Source, ours: bool) -> str:
    model = source.config.model
    if not is_routed(source.config):
        kind = class_name(source.config).removesuffix("ForCausalLM")
        code = "Its code is beside its weights." if ours else f"It is a plain {kind} model."
        return f"A language model of {model.num_layers} layers, each computed for every token. {code}"
    layers, router = len(source.config.routed_layers), source.config.routing.router
    return (
        f"A language model of {model.num_layers} layers, of which {layers} have routers (`{router}`): "
        "every token decides, at each of them, whether to be computed. Its code is beside its weights; cached decoding "
        "computes executed tokens only."
    )


def _facts(source: Source) -> dict[str, str]:
    config, record = source.config, source.record
    model = config.model
    return {
        "parameters": f"{num_parameters(model, config.routing):,}",
        "hidden size, layers, heads (key-value heads)": f"{model.hidden_size}, {model.num_layers}, "
        f"{model.num_attention_heads} ({model.kv_heads})",
        "vocabulary": f"{source.tokenizer.vocab_size:,} pieces, {model.vocab_size:,} rows",
        "sequence length": f"{config.data.sequence_length:,}",
        "optimizer steps": f"{record.step:,}",
        "tokens": f"{record.tokens:,}",
        "precision": config.train.precision,
        "layout": record.layout,
        "tokenizer sha256": source.tokenizer.fingerprint,
        "megaroute": __version__,
    }


def _density(source: Source, measured: list[float] | None) -> str:
    units = source.config.units if is_routed(source.config) else ()
    if not units:
        return "\nEvery token executes every layer.\n\n"
    targets = source.config.routing.targets(source.config.model.num_layers, source.record.step)
    shares: Sequence[float | None] = measured or [None] * len(units)
    lines = ["", "| routed unit | target | executed, check text |", "|---|---|---|"]
    for unit, target, share in zip(units, targets, shares, strict=True):
        lines.append(f"| {unit.label} | {target:.3f} | {'-' if share is None else format(share, '.3f')} |")
    if measured:
        mean = executed_layers(source.config.model.num_layers, units, measured)
        lines += ["", f"On the check text a token executed {mean:.2f} of {source.config.model.num_layers} layers."]
    return "\n".join([*lines, ""])


def _check(found: dict[str, Any]) -> str:
    if not found:
        return "The conversion was not checked (`--no-check`)."
    return (
        f"In float32 its logits differ from the checkpoint's by at most {found['max_difference']:.1e} over "
        f"{found['tokens']:,} tokens of text, and the greedy continuation of {found['continuation']} tokens is the "
        "same."
    )
