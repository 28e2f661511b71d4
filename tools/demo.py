"""The main job, end to end, on this machine: `make demo`.

Text of the running Python -> tokenizer -> shards -> a routed model under tensor parallel 2 x pipeline parallel 2,
started through DeepSpeed's launcher, killed in the middle, resumed -> a sample of text, a report and summary.json.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from megaroute.common.errors import MegarouteError
from megaroute.common.files import write_json
from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.config.sizes import num_parameters
from megaroute.data.unigram import unigram_bits_per_byte
from megaroute.metrics.history import History, differences, overlap, read_history
from megaroute.metrics.records import TrainRecord
from megaroute.metrics.sinks import FILE_NAME

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "pretrain_configs" / "debug" / "demo.yaml"
REPEATED_STEPS = 10
"""Steps after a checkpoint at which the run is killed: the resumed run repeats them, and must repeat them exactly."""
PROMPT = "import os\n\n\ndef "


class DemoFailed(MegarouteError):
    """A part of the demo did not do what it must."""


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a small routed model from nothing, interrupted on the way.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="over pretrain_configs/debug/demo.yaml")
    overrides = parser.parse_args().overrides
    os.chdir(REPOSITORY)
    try:
        run(overrides)
    except MegarouteError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def run(overrides: list[str]) -> None:
    """All stages, in order."""
    began = time.monotonic()
    config = load_config(CONFIG, overrides)
    shutil.rmtree(config.run_directory, ignore_errors=True)
    say("1/5  text of the running Python -> tokenizer -> shards")
    prepare_data(config)
    command = [sys.executable, "-m", "megaroute.cli", "launch", str(CONFIG), *overrides]
    layout = f"tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline}"
    say(f"2/5  training, {layout}; it will be killed on the way\n     {' '.join(command[1:])}")
    killed_at = train_and_kill(command, config)
    say(f"3/5  killed with SIGKILL after step {killed_at}; the same command again")
    finish(command)
    say("4/5  a sample of text from the newest checkpoint")
    generate(config)
    say("5/5  what happened")
    summary = summarise(config, time.monotonic() - began)
    write_json(config.run_directory / "summary.json", summary)
    print(closing_lines(config, summary))


def say(text: str) -> None:
    """A heading between stages."""
    print(f"\n== {text}", flush=True)


def prepare_data(config: Config) -> None:
    """Tokenizer and shards, written anew."""
    data = config.data
    data.tokenizer.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = ["--vocab-size", str(config.model.vocab_size)]
    tool("train_tokenizer.py", *vocabulary, "--out", str(data.tokenizer))
    out = ["--out", str(data.train), "--valid-out", str(data.valid), "--shard-bytes", "4M"]
    tool("make_shards.py", *out, "--tokenizer", str(data.tokenizer))


def tool(name: str, *arguments: str) -> None:
    """Run a tool on the standard library's text; raises DemoFailed when it fails."""
    command = [sys.executable, str(REPOSITORY / "tools" / name), "--source", "stdlib", "--overwrite", *arguments]
    check(subprocess.run(command, check=False).returncode, name)


def check(code: int, what: str) -> None:
    """Raise DemoFailed unless `code` is 0."""
    if code != 0:
        raise DemoFailed(f"{what} ended with exit code {code}; its own message stands above")


def train_and_kill(command: list[str], config: Config) -> int:
    """Start the run and kill all its processes some steps after its first checkpoint; returns the last step seen."""
    assert config.checkpoint.every is not None
    metrics = config.run_directory / FILE_NAME
    # At a checkpoint's step its save may still be under way, so the steps are counted after it.
    target = config.checkpoint.every + REPEATED_STEPS
    launcher = subprocess.Popen(command)
    try:
        wait_until(lambda: last_step(metrics) >= target, launcher)
    finally:
        kill_tree(launcher)
    return last_step(metrics)


def last_step(metrics: Path) -> int:
    """Newest step in metrics.jsonl, 0 before there is one."""
    train = read_history(metrics).train if metrics.exists() else ()
    return train[-1].step if train else 0


def wait_until(done: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> None:
    """Poll until `done`; raises DemoFailed when the run ends before."""
    while not done():
        if launcher.poll() is not None:
            raise DemoFailed(f"the run ended with exit code {launcher.returncode} before it could be interrupted")
        time.sleep(0.2)


def kill_tree(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the launcher and everything below it, as when a node loses power."""
    if launcher.poll() is None:
        processes = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
    launcher.wait()


def finish(command: list[str]) -> None:
    """The same command goes on from the newest checkpoint, to the end."""
    check(subprocess.run(command, check=False).returncode, "the resumed run")


def generate(config: Config) -> None:
    """Print a sample."""
    words = ["generate", str(config.run_directory), "--prompt", PROMPT, "--tokens", "60", "--temperature", "0.7"]
    check(subprocess.run([sys.executable, "-m", "megaroute.cli", *words], check=False).returncode, "generate")


def summarise(config: Config, seconds: float) -> dict[str, Any]:
    """Everything that the demo claims, from the run's own metrics."""
    history = read_history(config.run_directory / FILE_NAME)
    train, target = history.train, config.routing.density
    last = train[-max(len(train) // 10, 1) :]
    densities = [density for record in last for density in record.density]
    measured = sum(densities) / len(densities)
    valid = history.valid[-1]
    return {
        "layout": f"tp{config.parallel.tensor} x pp{config.parallel.pipeline}",
        "steps": train[-1].step,
        "parameters": num_parameters(config.model, config.routing),
        "loss_first": train[0].loss,
        "loss_last": train[-1].loss,
        "valid_bits_per_byte": valid.bits_per_byte,
        "unigram_bits_per_byte": unigram_bits_per_byte(
            config.data, config.model.vocab_size, train_rows=2000, valid_rows=config.train.validate_samples
        ),
        "density_target": target,
        "density_measured": measured,
        "density_greedy": sum(valid.density) / len(valid.density),
        "executed_flops_share": sum(r.executed_flops for r in train) / sum(r.dense_flops for r in train),
        "data_wait_share": data_wait_share(train),
        "resumed_at_step": next(event.step for event in history.events if event.kind == "resume"),
        "resume_compared_steps": len(overlap(history)),
        "resume_bit_equal": resumed_bit_equal(history),
        "seconds": round(seconds, 1),
    }


def data_wait_share(train: Sequence[TrainRecord]) -> float:
    """Share of the time of steps that they waited for rows; not of the first after a start, in which workers start."""
    settled = [after for before, after in pairwise(train) if before.attempt == after.attempt]
    return sum(record.data["wait_s"] for record in settled) / sum(record.seconds for record in settled)


def resumed_bit_equal(history: History) -> bool:
    """Whether every step that both attempts computed has the same bits: loss, gradient norm and every density."""
    pairs = overlap(history)
    return bool(pairs) and not any(differences(before, after) for _, before, after in pairs)


def closing_lines(config: Config, summary: dict[str, Any]) -> str:
    """What happened, and where to look."""
    exactly = "the same bits" if summary["resume_bit_equal"] else "OTHER NUMBERS, which is a fault"
    return "\n".join(
        (
            f"{summary['parameters']:,} parameters trained {summary['steps']} steps on {summary['layout']} "
            f"in {summary['seconds']:.0f} s, data preparation included",
            f"loss {summary['loss_first']:.3f} -> {summary['loss_last']:.3f}; validation "
            f"{summary['valid_bits_per_byte']:.3f} bits per byte, a unigram of tokens has "
            f"{summary['unigram_bits_per_byte']:.3f}",
            f"routed layers executed {summary['density_measured']:.1%} of tokens (target "
            f"{summary['density_target']:.0%}), {summary['density_greedy']:.1%} in greedy validation; "
            f"{summary['executed_flops_share']:.0%} of the dense model's FLOPs",
            f"steps waited for data {summary['data_wait_share']:.1%} of their time",
            f"killed and resumed at step {summary['resumed_at_step']}: the {summary['resume_compared_steps']} steps "
            f"that both attempts computed have {exactly}",
            f"look at {config.run_directory / 'report.html'} (curves, and which tokens skipped which layers), "
            f"{config.run_directory / 'summary.json'}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
