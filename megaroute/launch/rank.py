"""What DeepSpeed's multi-node launchers start as each rank: they want a script, and keep few variables.

python rank.py NAME=VALUE ... pretrain CONFIG [KEY=VALUE ...]
"""

import importlib
import os
import sys
from collections.abc import MutableMapping, Sequence

PROCESSES = "MEGAROUTE_PROCESSES"
"""Variable: how many ranks there must be."""

_OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}


def adopt(words: Sequence[str], environment: MutableMapping[str, str]) -> list[str]:
    """Take the variables in front of `pretrain` into the environment, the rank from MPI's; returns the other words.

    Under MPI, SLURM's variables are those of the daemon that started the rank, and are dropped.
    """
    cut = words.index("pretrain")
    environment.update({name: value for name, _, value in (word.partition("=") for word in words[:cut])})
    if "OMPI_COMM_WORLD_RANK" in environment:
        environment.update({name: environment[source] for name, source in _OPENMPI.items()})
    if "OMPI_COMM_WORLD_RANK" in environment or ("PMI_RANK" in environment and "RANK" in environment):
        for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
            environment.pop(name, None)
    return list(words[cut:])


def world_size_error(environment: MutableMapping[str, str]) -> str:
    """A sentence if the launcher started another number of ranks than it was asked for."""
    found, wanted = environment.get("WORLD_SIZE") or environment.get("SLURM_NTASKS"), environment[PROCESSES]
    if found == wanted:
        return ""
    return (
        f"the launcher started {found or 'ranks that do not know of each other'} where {wanted} ranks were asked for: "
        "they would train several models side by side; see docs/operations.md on launchers"
    )


def main() -> int:
    """Become the command line of megaroute."""
    sys.path.pop(0)  # the folder of this file, which holds no modules of that name
    words = adopt(sys.argv[1:], os.environ)
    error = world_size_error(os.environ)
    if error:
        print(f"megaroute: error: {error}", file=sys.stderr)
        return 2
    return int(importlib.import_module("megaroute.cli").main(words))


if __name__ == "__main__":
    sys.exit(main())
