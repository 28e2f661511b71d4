"""The `megaroute` command.  Imports happen in the handlers: help and errors must not wait for torch."""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaroute import __version__
from megaroute.common.errors import ConfigError, MegarouteError
from megaroute.common.pipes import quietly

if TYPE_CHECKING:
    from megaroute.training.signals import StopRequest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0, 2 for what the user can mend, or what the run returned."""
    return quietly(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parse(argv)
    try:
        return int(arguments.handler(arguments))
    except MegarouteError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _report(error: MegarouteError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank and isinstance(error, ConfigError):
        return  # every rank read the same configuration: rank 0 says it
    where = f"[rank {rank}] " if rank else ""
    for line in str(error).splitlines():
        print(f"megaroute: error: {where}{line}", file=sys.stderr)


def _config_show(arguments: argparse.Namespace) -> int:
    from megaroute.config.checks import check_config
    from megaroute.config.load import dump_config, load_config

    config = load_config(arguments.config, arguments.overrides)
    check_config(config)
    print(dump_config(config), end="")
    return 0


def _config_schema(_: argparse.Namespace) -> int:
    import json

    from megaroute.config.load import config_schema

    print(json.dumps(config_schema(), indent=2))
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    from megaroute.common import log
    from megaroute.config.load import load_config
    from megaroute.evaluation import task_list
    from megaroute.launch import cluster, command, devices, local, rundir, slurm
    from megaroute.training import preflight

    config = load_config(arguments.config, arguments.overrides)
    inside = slurm.in_allocation()
    launcher: cluster.Launcher = arguments.launcher or ("slurm" if inside and arguments.nproc is None else "local")
    cluster.check_launcher(launcher, inside)
    allocation = slurm.allocation() if launcher != "local" else None
    processes = allocation.processes if allocation else command.num_processes(config, arguments.nproc)
    device = devices.detect_device(config.run.device)
    config_file = config.run_directory / rundir.CONFIG_FILE
    if allocation:
        launch = cluster.cluster_launch(config_file, config.run_directory, allocation, launcher, device)
    else:
        launch = command.local_launch(config_file, processes, device)
    log.configure()
    with log.when_it_takes_long("checking the data (data.verify=%s)", config.data.verify):
        preflight.check(config, processes)
    task_list.of_run(config)
    if arguments.dry_run:
        if allocation:
            print(f"# {config.run_directory / cluster.HOST_FILE} is to hold:")
            print("".join(f"#   {line}\n" for line in cluster.host_lines(allocation).splitlines()), end="")
        print(command.by_hand(launch, arguments.config, arguments.overrides).shell_line())
        return 0
    rundir.prepare_run_directory(config)
    started = f"{processes} processes" if processes > 1 else "1 process"
    log.get_logger().info("starting %s in %s", started, config.run_directory)
    if allocation:
        cluster.write_host_file(config.run_directory, allocation)
        status = cluster.run(launch, config.run_directory, allocation, config.run.stop_grace_s)
    else:
        status = local.run(launch, config.run.stop_grace_s)
    if status and config.metrics.report:
        _report_of_unfinished(config.run_directory)
    return status


def _status(arguments: argparse.Namespace) -> int:
    from megaroute.launch import status

    print(status.table(arguments.runs))
    return 0


def _report_of_unfinished(directory: Path) -> None:
    """The page of a run that was stopped or failed; its ranks write it only when they finish."""
    from megaroute.common.log import get_logger
    from megaroute.metrics import sinks
    from megaroute.metrics.report import write_report

    if (directory / sinks.FILE_NAME).exists():
        get_logger().info("report: %s", write_report(directory))


def _pretrain(arguments: argparse.Namespace) -> int:
    from megaroute.launch import exits
    from megaroute.training.signals import StopRequest

    stop = StopRequest(joined=False)
    stop.listen()  # first: to load torch takes seconds, in which a request to stop must be neither deadly nor lost
    with exits.recorded() as codes:
        codes.append(_rank(arguments, stop))
    return exits.process_code(codes[-1])


def _rank(arguments: argparse.Namespace, stop: "StopRequest") -> int:
    from megaroute.config.load import load_config
    from megaroute.launch import devices, local, slurm_env

    _silence_warnings()
    slurm_env.set_rank_environment()
    local.follow_supervisor()
    config = load_config(arguments.config, arguments.overrides)
    if config.run.device == "cpu":
        devices.hide_devices(os.environ)
    from megaroute.evaluation import in_loop
    from megaroute.training import pretrain

    try:
        score_tasks = in_loop.InLoop(config) if config.evaluate.tasks else None
        return pretrain.main(config, stop, score_tasks)
    finally:
        stop.ignore()


def _silence_warnings() -> None:
    """Hide what torch and Megatron-core tell their own developers, once per rank; PYTHONWARNINGS=default shows it."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _generate(arguments: argparse.Namespace) -> int:
    _silence_warnings()
    from megaroute.evaluation import generate

    return generate.main(
        run=arguments.run,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    _silence_warnings()
    from megaroute.launch import slurm_env

    slurm_env.set_rank_environment()
    from megaroute.evaluation import command

    if arguments.suite:
        return command.tasks(
            model=arguments.model,
            names=arguments.tasks,
            data_dir=arguments.data_dir,
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            precision=arguments.precision,
            batch=arguments.batch,
            limit=arguments.limit,
            out=arguments.out,
        )
    return command.files(
        model=arguments.model,
        paths=arguments.bits_per_byte,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        precision=arguments.precision,
        batch=arguments.batch,
        stride=arguments.stride,
        limit=arguments.limit,
        text_field=arguments.text_field,
        out=arguments.out,
    )


def _write_report(arguments: argparse.Namespace) -> int:
    from megaroute.metrics.report import write_comparison, write_report

    several = len(arguments.runs) > 1
    print(
        write_comparison(arguments.runs, arguments.out) if several else write_report(arguments.runs[0], arguments.out)
    )
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option: `launch FILE --nproc 2 train.steps=5`.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) < len(rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += overrides
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaroute", description="Pretrain language models in which every token decides whether to be computed."
    )
    parser.add_argument("--version", action="version", version=f"megaroute {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_config(commands)
    launch = _add(
        commands,
        "launch",
        _launch,
        "start a run here, or on the nodes of a SLURM job",
        "pretrain_configs/debug/cpu.yaml",
    )
    _add_config_arguments(launch)
    launch.add_argument(
        "--nproc", type=_positive, metavar="N", help="processes; the default is tensor * pipeline * data"
    )
    launch.add_argument(
        "--launcher",
        choices=("local", "slurm", "openmpi", "mpich", "pdsh"),
        help="who starts the processes; the default is slurm inside an allocation and local elsewhere",
    )
    launch.add_argument("--dry-run", action="store_true", help="check configuration and data, and print the command")
    pretrain = _add(
        commands, "pretrain", _pretrain, "one rank of a run; what launch and srun start", "runs/x/config.yaml"
    )
    _add_config_arguments(pretrain)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_report(commands)
    status = _add(commands, "status", _status, "print how runs stand, a line for each", "runs/*")
    status.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    return parser


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "write report.html of a run, or a page that compares several, and print its path"
    report = _add(commands, "report", _write_report, summary, "runs/cpu")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory; several are compared")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: report.html in RUN; of several, comparison.html beside the first RUN)",
    )


def _add_config(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    config = commands.add_parser("config", help="show a resolved configuration, or the schema of all keys")
    actions = config.add_subparsers(metavar="ACTION", required=True)
    show = _add(actions, "show", _config_show, "print a configuration with every key", "run.yaml", "config show")
    _add_config_arguments(show)
    _add(actions, "schema", _config_schema, "print the JSON schema, for editors", "> megaroute.json", "config schema")


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    example = "runs/cpu --prompt 'def main' --tokens 80"
    generate = _add(commands, "generate", _generate, "continue a text with a trained model", example)
    generate.add_argument(
        "run", type=Path, metavar="RUN", help="run directory (its newest checkpoint), checkpoint, or exported model"
    )
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--tokens", type=_positive, default=64, metavar="N", help="tokens to add (default 64)")
    generate.add_argument(
        "--temperature", type=_temperature, default=0.8, metavar="T", help="0 takes the likeliest token (default 0.8)"
    )
    generate.add_argument("--top-k", type=_positive, metavar="K", help="choose among the K likeliest (default: all)")
    generate.add_argument("--seed", type=_seed, default=0, metavar="S", help="seed of the choices (default 0)")


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    example = "runs/cpu --bits-per-byte data/valid.jsonl"
    evaluate = _add(commands, "evaluate", _evaluate, "score a trained model, on one process or several", example)
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="run directory, or a checkpoint in it")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--bits-per-byte", type=Path, nargs="+", metavar="FILE", help="text to score: JSON lines, Parquet, text"
    )
    what.add_argument("--suite", choices=("skiplayer24",), help="tasks to run")
    evaluate.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="read the tasks from files here, without a network"
    )
    evaluate.add_argument("--tasks", nargs="+", metavar="NAME", help="some tasks of the suite (default: all)")
    evaluate.add_argument("--text-field", default="text", metavar="NAME", help="field of the text (default text)")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="score only N documents (of each task)")
    evaluate.add_argument(
        "--stride", type=_positive, metavar="N", help="tokens that each window scores (default: half the context)"
    )
    evaluate.add_argument(
        "--batch",
        type=_positive,
        default=8,
        metavar="N",
        help="rows of the whole context in a forward pass (default 8)",
    )
    evaluate.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="fp32 (default): the result does not depend on ranks and batch; bf16: faster on an accelerator",
    )
    evaluate.add_argument("--tensor", type=_positive, default=1, metavar="N", help="tensor-parallel size (default 1)")
    evaluate.add_argument("--pipeline", type=_positive, default=1, metavar="N", help="pipeline stages (default 1)")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there instead of printing it")


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    handler: object,
    summary: str,
    example: str,
    words: str = "",
) -> argparse.ArgumentParser:
    epilog = f"example: megaroute {words or name} {example}"
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    parser.set_defaults(handler=handler)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys over the file, such as train.steps=100"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
