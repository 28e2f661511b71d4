"""A tiny run for tests of training: its corpus, its configuration, and ranks that train it."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from ranks import run_ranks

WORKER = Path(__file__).with_name("train_worker.py")

# Comparisons want a run that does not amplify rounding errors: embeddings far from 0, where norms have steep gradients,
# and densities that do not swing.
CONFIG = """
run: {{name: tiny, device: cpu, directory: {folder}/run}}
model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  num_kv_heads: 2
  ffn_hidden_size: 96
  vocab_size: 512
  init_std: 0.1
routing: {{first_dense: 1, init_logit_std: 2.0, budget: {{weight: 0.01}}, controller: {{gain: 2.0}}}}
data:
  train: {data}/train
  valid: {data}/valid
  tokenizer: {data}/tokenizer.model
  sequence_length: 64
  lanes: 8
train: {{steps: 100, global_batch: 8, micro_batch: 2}}
optim: {{lr: 3.0e-3, warmup_steps: 4}}
"""


SYLLABLES = [
    consonant + vowel for consonant in ("b", "d", "k", "l", "m", "n", "r", "s", "st", "t") for vowel in "aeiou"
]


def invented_texts(count: int) -> list[str]:
    """Texts of sentences of invented words, some far more frequent than others; the same on every machine."""
    draw = random.Random(1)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(500)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(4, 14))).capitalize() + "."

    return [" ".join(sentence() for _ in range(draw.randint(5, 50))) for _ in range(count)]


def make_corpus(folder: Path) -> Path:
    """Shards of invented text and a tokenizer: what a run does must not change with whatever text is at hand."""
    from megaroute.data.build import build_shards
    from megaroute.data.documents import Document
    from megaroute.data.tokenizer import Tokenizer
    from megaroute.data.tokenizer_training import train_tokenizer

    documents = [Document(f"text-{number}", text) for number, text in enumerate(invented_texts(300))]
    train_tokenizer(documents, folder / "tokenizer.model", vocab_size=512)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    shards = {"shard_bytes": 100_000, "tokenizer": tokenizer, "valid_out": folder / "valid", "valid_fraction": 0.1}
    build_shards(documents, folder / "train", **shards)
    return folder


def write_config(folder: Path, data: Path) -> Path:
    """The tiny run's configuration, with its run directory below `folder`."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(folder=folder, data=data))
    return path


class Ranks:
    """Trains the tiny run on a number of ranks; several runs share one start of processes, which is what costs."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder, self.starts = config, folder, 0

    def train(
        self, world_size: int, runs: dict[str, list[str]], steps: int, save: Iterable[str] = (), timeout_s: float = 280
    ) -> dict[str, list[list[dict]]]:
        """{run name: overrides} -> {run name: [steps of rank 0, steps of rank 1, ..]}; runs in `save` end with one."""
        spec = [
            {
                "name": name,
                "config": str(self.config),
                "overrides": overrides,
                "steps": steps,
                "save": name in save,
            }
            for name, overrides in runs.items()
        ]
        self.starts += 1
        outputs = run_ranks(
            WORKER, world_size, {"runs": spec}, self.folder / f"start-{self.starts}", timeout_s=timeout_s
        )
        return {name: [output[name] for output in outputs] for name in runs}


def decisions(ranks: list[list[dict]]) -> list[dict[tuple[int, int], set[int]]]:
    """Per step {(unit, sample): kept positions} over all ranks; ranks that hold the same unit must agree."""
    merged: list[dict[tuple[int, int], set[int]]] = []
    for step in zip(*ranks, strict=True):
        found: dict[tuple[int, int], set[int]] = {}
        for rank in step:
            for unit, sample, kept, _ in rank["decisions"]:
                assert found.setdefault((unit, sample), set(kept)) == set(kept), "ranks disagree on a decision"
        merged.append(found)
    return merged


def close_calls(ranks: list[list[dict]]) -> list[dict[tuple[int, int], set[int]]]:
    """Per step {(unit, sample): positions whose margin is below 1e-5}, of a run without sequence parallelism."""
    return [
        {(unit, sample): set(close) for rank in step for unit, sample, _, close in rank["decisions"]}
        for step in zip(*ranks, strict=True)
    ]


def numbers(ranks: list[list[dict]]) -> list[dict]:
    """The steps of rank 0 without decisions; all ranks must report the same."""
    plain = [[{k: v for k, v in step.items() if k != "decisions"} for step in rank] for rank in ranks]
    assert all(json.dumps(rank) == json.dumps(plain[0]) for rank in plain), "ranks report different numbers"
    return plain[0]


def assert_same_run(
    name: str, result: list[list[dict]], expected: list[list[dict]], gradient: float = 1e-5, budget: float = 1e-6
) -> None:
    """Losses to 1e-6, and the same decisions but for those with a margin below 1e-5.

    `gradient` and `budget` are the tolerances of the gradients' norm and of the routers' own loss.
    """
    for a, b in zip(numbers(result), numbers(expected), strict=True):
        where = f"{name}, step {a['step']}"
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), where
        assert a["budget_loss"] == pytest.approx(b["budget_loss"], rel=budget, abs=1e-9), where
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=gradient), where
    differing = 0
    steps = zip(decisions(result), decisions(expected), close_calls(expected), strict=True)
    for number, (mine, reference, close) in enumerate(steps):
        assert mine.keys() == reference.keys(), f"{name}: other samples or units in step {number}"
        for key, kept in mine.items():
            changed = kept ^ reference[key]
            assert changed <= close.get(key, set()), f"{name}, step {number}, (unit, sample) {key}: {changed}"
            differing += len(changed)
    print(f"{name}: {differing} decisions with a margin below 1e-5 differ")
