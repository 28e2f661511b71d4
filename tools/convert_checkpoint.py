"""From a checkpoint to a Hugging Face model and back, and to a checkpoint from which DeepSpeed goes on training.

to-hf and from-hf compare the logits of both models on text, and a greedy continuation, before they say that they are
done.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

if not sys.warnoptions:  # Megatron-core and torch tell their own developers of things that nobody here can change
    warnings.simplefilter("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is local; before transformers is imported

from megaroute.common.errors import MegarouteError, UserError
from megaroute.common.pipes import quietly

GIB = 2**30


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    to_hf = ways.add_parser("to-hf", help="write a checkpoint as a transformers model")
    to_hf.add_argument("checkpoint", type=Path, help="checkpoint, folder of checkpoints, or run directory (its newest)")
    to_hf.add_argument("out", type=Path, help="folder to make; it must not exist or be empty")
    to_hf.add_argument(
        "--shard-gib", type=float, default=4.0, metavar="N", help="largest size of one file of weights (%(default)s)"
    )
    _add_check(to_hf)
    from_hf = ways.add_parser("from-hf", help="write a transformers model as a checkpoint that runs can start from")
    from_hf.add_argument("model", type=Path, help="folder with config.json and safetensors files")
    from_hf.add_argument("out", type=Path, help="run directory to make; it must not exist or be empty")
    from_hf.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys of the configuration that is written"
    )
    from_hf.add_argument(
        "--as",
        dest="kind",
        choices=("dense", "routed"),
        help="routed: give a dense model routers, which at first execute every token (default: as the model is)",
    )
    from_hf.add_argument("--tokenizer", type=Path, metavar="FILE", help="sentencepiece model, where MODEL has none")
    _add_check(from_hf)
    to_universal = ways.add_parser("to-universal", help="write a checkpoint in DeepSpeed's universal format")
    to_universal.add_argument("checkpoint", type=Path, help="as for to-hf; it must have optimizer state")
    to_universal.add_argument("out", type=Path, help="folder to make; it must not exist or be empty")
    arguments, rest = parser.parse_known_args(argv)  # overrides may also come after options
    if rest and (arguments.way != "from-hf" or any("=" not in word or word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to compare both models on (default: our own)")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the models, which takes memory for each of them in turn"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    return quietly(lambda: _run(parse_arguments(argv)))


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.way == "to-universal":
            return _to_universal(arguments)
        return _with_transformers(arguments)
    except MegarouteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _with_transformers(arguments: argparse.Namespace) -> int:
    _quiet_transformers()
    try:
        return _to_hf(arguments) if arguments.way == "to-hf" else _from_hf(arguments)
    finally:
        _stop()


def _quiet_transformers() -> None:
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f"a conversion needs transformers, which cannot be imported ({error}); pip install 'megaroute[export]'"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _stop() -> None:
    """What a check of a checkpoint started."""
    from megaroute.parallel import groups
    from megaroute.platform import distributed

    groups.tear_down()
    distributed.stop()


def _to_hf(arguments: argparse.Namespace) -> int:
    from megaroute.evaluation.logit_gate import check_export
    from megaroute.export.to_hf import to_hf

    text = _text(arguments)
    check = None if arguments.no_check else lambda source, folder: check_export(source, folder, text)
    done = to_hf(arguments.checkpoint, arguments.out, int(arguments.shard_gib * GIB), check)
    reason = f" ({done.why_not_llama}, so not as a plain Llama model)" if done.why_not_llama else ""
    print(f"{arguments.out}: {done.class_name}{reason}, {done.bytes / 1e6:,.1f} MB of weights")
    print(_verdict(done.found))
    return 0


def _to_universal(arguments: argparse.Namespace) -> int:
    from megaroute.export.to_universal import to_universal

    done = to_universal(arguments.checkpoint, arguments.out)
    print(
        f"{arguments.out}: {done.tag}, {done.parameters} parameters with their AdamW moments after {done.step} steps, "
        f"{done.bytes / 1e6:,.1f} MB"
    )
    print(
        f'go on under DeepSpeed: "checkpoint": {{"load_universal": true}} in its configuration, and '
        f"engine.load_checkpoint({str(arguments.out)!r})"
    )
    return 0


def _from_hf(arguments: argparse.Namespace) -> int:
    from megaroute.evaluation.logit_gate import check_import
    from megaroute.export.from_hf import from_hf

    text, out = _text(arguments), arguments.out
    check = None if arguments.no_check else lambda folder, source: check_import(folder, source, text)
    routed = None if arguments.kind is None else arguments.kind == "routed"
    done = from_hf(arguments.model, out, check, routed, arguments.overrides, arguments.tokenizer)
    layers = len(done.config.routed_layers)
    shape = f"{layers} of {done.config.model.num_layers} layers routed" if layers else "dense"
    upcycled = ", upcycled" if done.upcycled else ""
    print(f"{out}: {done.kind} model, {shape}{upcycled}, {done.bytes / 1e6:,.1f} MB of weights")
    print(done.tokenizer)
    print(_verdict(done.found))
    print(
        f"train it: megaroute launch {out}/config.yaml run.name=NAME data.train=SHARDS "
        f"data.sequence_length={min(done.config.data.sequence_length, 2048)} train.global_batch=ROWS train.steps=STEPS"
    )
    return 0


def _text(arguments: argparse.Namespace) -> str | None:
    if arguments.text is None:
        return None
    try:
        return str(arguments.text.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--text {arguments.text} cannot be read as text ({error}); give another file") from error


def _verdict(found: dict[str, object]) -> str:
    if not found:
        return "not checked (--no-check): whether it is the same model is not known"
    return (
        f"checked in float32 on {found['tokens']} tokens: logits differ by at most {found['max_difference']:.1e}, "
        f"greedy continuation of {found['continuation']} tokens identical"
    )


if __name__ == "__main__":
    sys.exit(main())
