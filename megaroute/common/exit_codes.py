"""Exit codes of a run; SLURM scripts read them to tell what to do next."""

FINISHED = 0
FAILED = 1
"""The run cannot go on, and would fail the same way again: it diverged, or there is an error in the program."""
BAD_INPUT = 2
"""The user has to mend something; nothing was written."""
LOST = 69
"""Another rank has gone, and this one could not go on without it: EX_UNAVAILABLE of sysexits.h.  Worth another try."""
HUNG = 70
"""No step ended in time, and the watchdog ended the process: worth another try, on other nodes if it comes again."""
STOPPED = 75
"""Asked to stop, saved, and to be started again: EX_TEMPFAIL of sysexits.h."""
