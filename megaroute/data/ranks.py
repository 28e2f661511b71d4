"""The processes of a job of data preparation: one, or those that mpirun or srun started, joined by MPI."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megaroute.common.errors import DataError, MegarouteError
from megaroute.data.formats import import_extra

T = TypeVar("T")

POLL_S = 0.05

# Hydra and Slurm's pmi2 set the first, Open MPI the second.  Slurm's own count is that of the step, since SLURM_NTASKS
# is set in a batch script too, where there is one process.
TASK_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
TASK_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


class Ranks:
    """A group of processes in which every one does the same calls in the same order."""

    def __init__(self, communicator: Any = None) -> None:
        self._comm = communicator
        self.rank: int = communicator.Get_rank() if communicator is not None else 0
        """Number of this process."""
        self.size: int = communicator.Get_size() if communicator is not None else 1
        """Number of processes."""

    def share(self, make: Callable[[], T]) -> T:
        """The result of `make()` on rank 0, or its error, on every rank."""
        result, error = attempt(make) if self.rank == 0 else (None, None)
        if self._comm is not None:
            self._wait_for_all()
            result, error = self._comm.bcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self._comm is None:
            return [value]
        self._wait_for_all()
        return self._comm.allgather(value)

    def _wait_for_all(self) -> None:
        """Asleep: MPI's own waiting takes a core that a rank still at work may want."""
        arrived = self._comm.Ibarrier()
        while not arrived.Test():
            time.sleep(POLL_S)

    def abort(self) -> None:
        """After an error of this rank alone: end all of them, for they would wait for it for ever."""
        if self._comm is not None:
            traceback.print_exc()
            sys.stderr.flush()
            self._comm.Abort(1)


def attempt(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of `make()`, or the error that it raised."""
    try:
        return make(), None
    except Exception as error:
        return None, error


def started_as_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher's variables say that this process is the first, or say nothing: it speaks for all."""
    return all(environment.get(name, "0") == "0" for name in TASK_RANKS)


def join_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The group that this process was started in; MPI is loaded only where a launcher started several.

    Raises DataError when several processes were started that cannot see each other: each would do the whole job.
    """
    tasks = max((int(value) for name in TASK_COUNTS if (value := environment.get(name, "")).isdigit()), default=1)
    if tasks == 1:
        return Ranks()
    import_extra("mpi4py", "mpi", f"a job of {tasks} processes")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{tasks} processes were started, but MPI cannot be loaded ({error}), so each would do the whole job; "
            f"load an MPI library, or start one process with --workers {tasks}"
        ) from error
    if MPI.COMM_WORLD.Get_size() == 1:
        raise DataError(
            f"{tasks} processes were started, but each is rank 0 of 1 to MPI, so each would do the whole job; start "
            f"them with mpirun, with srun --mpi=pmi2 for MPICH, or with srun --mpi=pmix for Open MPI"
        )
    return Ranks(MPI.COMM_WORLD)


def lowest_error(errors: list[tuple[int, Exception] | None]) -> Exception | None:
    """Of (place, error) pairs, the error at the first place, users' errors before others; None if there is none."""
    found = [error for error in errors if error is not None]
    found.sort(key=lambda pair: (not isinstance(pair[1], MegarouteError), pair[0]))
    return found[0][1] if found else None
