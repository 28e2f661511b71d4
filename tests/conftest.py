"""What several test folders share: a tiny corpus, a tiny configuration, and a process group of one."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.data.build import build_shards
from megaroute.data.documents import Document
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.tokenizer_training import train_tokenizer
from megaroute.launch.rundir import prepare_run_directory

SENTENCE = "the router reads every token and decides whether a layer is worth its time or not"

TINY = {
    "run": {"name": "tiny", "device": "cpu"},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 320,
    },
    "routing": {"first_dense": 1},
    "optim": {"lr": 1e-2, "min_lr": 1e-3},
    "train": {"steps": 4, "global_batch": 8, "micro_batch": 4},
    "metrics": {"log_every": 1, "tensorboard": False, "report": False},
}


def tiny_documents(count: int, seed: int) -> list[Document]:
    """Texts of 5 to 60 words each."""
    draw = random.Random(seed)
    return [
        Document(f"{seed}-{i}", " ".join(draw.choices(SENTENCE.split(), k=draw.randint(5, 60)))) for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tok.model, other.model, and shards in train/, valid/, and untied/: as train/, but of no tokenizer.

    Not to be changed; copy it to damage it.
    """
    root = tmp_path_factory.mktemp("corpus")
    texts = tiny_documents(120, seed=1)
    train_tokenizer(texts, root / "tok.model", vocab_size=300)
    train_tokenizer(texts, root / "other.model", vocab_size=290)
    tokenizer = Tokenizer(root / "tok.model")
    build_shards(texts, root / "train", shard_bytes=8000, tokenizer=tokenizer)
    build_shards(texts, root / "untied", shard_bytes=8000)
    build_shards(tiny_documents(30, seed=2), root / "valid", shard_bytes=8000, tokenizer=tokenizer)
    return root


@pytest.fixture(scope="session")
def tiny_file(tiny_corpus: Path) -> Path:
    """Configuration file of a model of 4 layers, 3 of them routed, on the tiny corpus; its folder is the corpus."""
    data = {name: str(tiny_corpus / name) for name in ("train", "valid")}
    data |= {"tokenizer": str(tiny_corpus / "tok.model"), "sequence_length": 32, "lanes": 8}
    path = tiny_corpus / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": data}, sort_keys=False))
    return path


@pytest.fixture
def tiny(tiny_file: Path, tmp_path: Path) -> Callable[..., Config]:
    """`tiny("a.b=1", ...)`: the tiny configuration with overrides; its run directory is `run` in the test's folder."""
    return lambda *overrides: load_config(tiny_file, [f"run.directory={tmp_path / 'run'}", *overrides])


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """Communication of a single process, as a run outside a launcher has it."""
    import torch

    from megaroute.parallel import groups
    from megaroute.platform import device, distributed

    if torch.cuda.is_available():  # Megatron-core is then left as it is and computes there
        pytest.skip("tests of one process on the CPU want CUDA_VISIBLE_DEVICES= in front of pytest")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
            patch.setenv(name, "")  # so that the end of the block restores what there was
            patch.delenv(name)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # threads that wait for each other take most of the time of so small tensors
        distributed.start(device.resolve("cpu"))
        yield
        groups.tear_down()
        distributed.stop()
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def start(one_process: None) -> Iterator[Callable[[Config], Any]]:
    """`start(config)`: all parts of a run in this process, from its newest checkpoint if there is one.

    Groups are those of the parts started last; only these can be saved.
    """
    from megaroute.platform import device
    from megaroute.training.setup import setup

    started = []

    def start(config: Config) -> Any:
        started.append(setup(config, device.resolve("cpu"), world_size=1))
        return started[-1]

    yield start
    for parts in started:
        parts.stream.close()


@pytest.fixture(scope="session")
def advance() -> Callable[..., list[Any]]:
    """`advance(parts, steps)`: take steps, count them, return their results."""
    from megaroute.training.step import run_step

    def advance(parts: Any, steps: int = 1) -> list[Any]:
        results = []
        for _ in range(steps):
            result = run_step(parts)
            padding = result.totals.padding
            parts.state.advance(result.rows, parts.config.data.sequence_length, result.skipped, padding=padding)
            results.append(result)
        return results

    return advance


@pytest.fixture(scope="session")
def save() -> Callable[[Any], Path]:
    """`save(parts)`: write the checkpoint of the step that the run is at."""
    from megaroute.training.setup import gather_cursor, run_record

    return lambda parts: parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts))


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Any], dict[str, Any]]:
    """`snapshot(parts)`: copies of every tensor that decides the next step: weights, router state, AdamW's state."""

    def snapshot(parts: Any) -> dict[str, Any]:
        found = {name: value.clone() for name, value in parts.chunks[0].state_dict().items() if value is not None}
        for part in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
            inner = part.optimizer
            params = [param for group in inner.param_groups for param in group["params"]]
            for index, param in enumerate(params):
                found[f"master {index}"] = param.detach().clone()
                for name, value in inner.state[param].items():
                    found[f"{name} {index}"] = value.clone()
        return found

    return snapshot


@pytest.fixture(scope="session")
def trained_run(start: Any, advance: Any, save: Any, tiny_file: Path, tmp_path_factory: Any) -> Path:
    """The tiny model after 12 steps.  Not to be changed; `copied_run` may be."""
    root = tmp_path_factory.mktemp("trained")
    config = load_config(tiny_file, [f"run.directory={root / 'run'}", "train.steps=12"])
    run = prepare_run_directory(config)
    parts = start(config)
    advance(parts, 12)
    save(parts)
    return run
