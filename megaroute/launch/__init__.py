"""Starting a run: DeepSpeed's argv, the supervisor of a local run, SLURM's variables, the run directory.  No torch."""
