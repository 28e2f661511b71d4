"""The run directory: what was asked for and which code was asked, written before the first rank starts."""

import datetime
import importlib.metadata
import os
import socket
import subprocess
import sys
from pathlib import Path

import megaroute
from megaroute.common.errors import LaunchError
from megaroute.common.files import atomic_write, write_json
from megaroute.config.load import dump_config
from megaroute.config.root import Config
from megaroute.launch import slurm_env

CONFIG_FILE = "config.yaml"
VERSION_FILE = "version.json"


def prepare_run_directory(config: Config) -> Path:
    """Make the run directory, write the resolved `config.yaml` and `version.json` into it, and return it.

    Call once the run is known to be allowed: what an earlier run left in the two files is replaced.  Raises LaunchError
    when the directory cannot be written.
    """
    directory = config.run_directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / CONFIG_FILE, dump_config(config))
        write_json(directory / VERSION_FILE, version_record())
    except OSError as error:
        raise LaunchError(
            f"run directory {directory} cannot be written: {error.strerror}; choose another one with run.directory"
        ) from None
    return directory


def version_record() -> dict[str, object]:
    """What a reader needs to run the same again: versions, commit, hosts, command and time."""
    return {
        "megaroute": megaroute.__version__,
        "commit": _commit(),
        "python": sys.version.split()[0],
        **{name: _version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "hosts": slurm_env.hosts() if "SLURM_JOB_NODELIST" in os.environ else [socket.gethostname()],
        "argv": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout megaroute runs from, with "+changes" if files differ; None for an installed copy."""
    package = Path(megaroute.__file__).resolve().parent
    # An installed copy may lie inside somebody else's repository, such as the user's project with its environment.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git(package, "status", "--porcelain", "-uno") else commit


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
