"""Submit a run: check its configuration first, and leave a status that says it is queued.

    python -m megaroute.launch.submit [--chain=N] [SBATCH OPTIONS] -- CONFIG [KEY=VALUE ...]

With --chain=N, for sites that forbid requeueing: N jobs of which one runs at a time, each going on where the last one
stopped.  Those that are left when the run has finished, or failed for good, end at once.
"""

import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from megaroute.common.errors import LaunchError, MegarouteError
from megaroute.config.load import load_config
from megaroute.launch import status

SCRIPT = "slurm/pretrain.sbatch"
_CHAIN = "--chain="


def main(argv: Sequence[str]) -> int:
    """Call sbatch; prints the job's number, or the numbers of a chain."""
    try:
        return _submit(argv)
    except MegarouteError as error:
        print(f"megaroute: error: {error}", file=sys.stderr)
        return error.exit_code


def _submit(argv: Sequence[str]) -> int:
    if "--" not in argv or argv[-1] == "--":
        raise LaunchError("put -- between the options of sbatch and the configuration: --nodes=2 -- run.yaml")
    cut = list(argv).index("--")
    words = argv[cut + 1 :]
    options = [word for word in argv[:cut] if not word.startswith(_CHAIN)]
    length = _chain_length(argv[:cut])
    config = load_config(words[0], words[1:])
    environment = dict(os.environ)
    if length:
        # singleton: one job of a name at a time, in order.
        name = f"{config.run.name}-{secrets.token_hex(3)}"
        options += [f"--job-name={name}", "--dependency=singleton", "--no-requeue"]
        environment |= {"MEGAROUTE_REQUEUE": "chain", "MEGAROUTE_CHAIN": name}
    jobs = [_sbatch([*options, SCRIPT, *words], environment) for _ in range(length or 1)]
    run_dir = config.run_directory
    run_dir.mkdir(parents=True, exist_ok=True)
    before = status.read(run_dir) or status.Status("queued")
    if before.state != "running":
        status.write(run_dir, replace(before, state="queued", why="", job=jobs[0], queued=status.now()))
    print(f"job {' '.join(jobs)} for {run_dir}; follow it with: megaroute status {run_dir}")
    return 0


def _sbatch(words: Sequence[str], environment: dict[str, str]) -> str:
    command = ["sbatch", "--parsable", *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    except OSError:
        raise LaunchError("sbatch is not on PATH; submit from a login node of the cluster") from None
    except subprocess.CalledProcessError as error:
        raise LaunchError(f"sbatch refuses the job: {error.stderr.strip()}") from None
    return done.stdout.strip().partition(";")[0]


def _chain_length(options: Sequence[str]) -> int:
    given = [word.removeprefix(_CHAIN) for word in options if word.startswith(_CHAIN)]
    if not given:
        return 0
    if not given[-1].isdigit() or int(given[-1]) < 2:
        raise LaunchError(f"--chain is {given[-1]!r}, must be a number of jobs of at least 2")
    return int(given[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
