"""Training runs in worker processes, one thread each, with their results kept in a folder."""

import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import megaroute
from megaroute.common.files import write_json
from megaroute.config.load import dump_config
from megaroute.config.root import Config
from megaroute.data.manifest import MANIFEST_NAME
from megaroute.platform import device, distributed
from megaroute.training.evaluate import validate
from megaroute.training.setup import setup
from megaroute.training.step import StepResult, run_step

POLL_S = 1.0
"""Seconds between two looks at the workers."""

_steps_done: Any = None
"""In a worker: how many steps all workers have done, in shared memory."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str
    seed: int
    config: Config

    @property
    def file_name(self) -> str:
        """Name of its result, the same only for the same configuration, code and text."""
        digest = hashlib.blake2b(code_fingerprint() + dump_config(self.config).encode(), digest_size=6)
        for folder in self.config.data.folders.values():
            digest.update((Path(folder) / MANIFEST_NAME).read_bytes())  # has the checksums of the text
        return f"{self.name}-seed{self.seed}-{digest.hexdigest()}.json"


@functools.cache
def code_fingerprint() -> bytes:
    """Of the sources of the package: a result of other code is not this code's."""
    digest, root = hashlib.blake2b(digest_size=16), Path(megaroute.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.digest()


def run_jobs(jobs: Sequence[Job], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Results in order of `jobs`, see `train`; those whose file is in `folder` already are read, not trained again.

    On a terminal a bar counts steps, elsewhere a line tells each finished run, both on standard error.
    """
    missing = [job for job in jobs if not (folder / job.file_name).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _train_all(missing, folder, min(workers, len(missing)))
    return [json.loads((folder / job.file_name).read_text()) for job in jobs]


def _train_all(jobs: list[Job], folder: Path, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        # The longest runs first, so that no worker is left with one at the end.
        futures = {pool.submit(train, job): job for job in sorted(jobs, key=_size, reverse=True)}
        total = sum(job.config.train.steps for job in jobs)
        with tqdm(total=total, unit="step", disable=None, desc=f"{len(jobs)} runs") as bar:
            try:
                for future in _finished(futures, bar, counter):
                    result, job = future.result(), futures[future]
                    write_json(folder / job.file_name, result)
                    _tell(bar, job, result)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _finished(futures: dict[Future[Any], Job], bar: Any, counter: Any) -> Iterator[Future[Any]]:
    """Futures as they end; moves the bar meanwhile."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
        bar.update(counter.value - bar.n)
        yield from done


def _tell(bar: Any, job: Job, result: dict[str, Any]) -> None:
    text = f"{job.name} seed {job.seed}: {result['bits_per_byte']:.4f} bits per byte in {result['seconds']:.0f} s"
    if bar.disable:
        print(text, file=sys.stderr, flush=True)
    else:
        bar.write(text, file=sys.stderr)


def _size(job: Job) -> int:
    model = job.config.model
    return model.num_layers * (model.ffn_hidden_size + model.hidden_size)


def _start_worker(counter: Any) -> None:
    global _steps_done
    _steps_done = counter
    torch.set_num_threads(1)
    distributed.start(device.resolve("cpu"))


def train(job: Job) -> dict[str, Any]:
    """Train one configuration to its end, by the same steps as `megaroute pretrain`, and validate it.

    Returns:
        `bits_per_byte` of the validation rows; means over the steps of `flops_per_token`; over their last quarter of
        `density` (share executed, by unit) and the training `loss`; `valid_density` with greedy routing; the number of
        `nonfinite` steps, processor `seconds`, and where it ran.
    """
    began, config = time.process_time(), job.config
    parts = setup(config, device.resolve("cpu"), world_size=1)
    assert parts.stream is not None
    results = []
    for _ in range(config.train.steps):
        result = run_step(parts)
        parts.state.advance(result.rows, config.data.sequence_length, result.skipped)
        results.append(_light(result))
        if _steps_done is not None:
            with _steps_done.get_lock():
                _steps_done.value += 1
    seconds = time.process_time() - began
    parts.stream.close()
    found = validate(parts)
    last = results[-max(len(results) // 4, 1) :]
    return {
        "name": job.name,
        "seed": job.seed,
        "bits_per_byte": found.bits_per_byte,
        "flops_per_token": statistics.fmean(flops for flops, *_ in results),
        "loss": statistics.fmean(loss for _, loss, *_ in last),
        "density": [statistics.fmean(unit) for unit in zip(*(density for *_, density, _ in last), strict=True)],
        "valid_density": list(found.density),
        "nonfinite": sum(skipped for *_, skipped in results),
        "steps": len(results),
        "seconds": seconds,
        "load": os.getloadavg()[0],
        "config": config.model_dump(mode="json"),
    }


def _light(result: StepResult) -> tuple[float, float, tuple[float, ...], bool]:
    """What is kept of a step: the rest holds on to its activations."""
    totals = result.totals
    return result.executed_flops / totals.tokens, totals.loss, totals.density, result.skipped
