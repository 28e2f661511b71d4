# shellcheck shell=bash
# Prepares the shell of a job: the environment of `make setup`, and nothing about the cluster.

if [ -f .venv/bin/activate ]; then
  # shellcheck source=/dev/null
  . .venv/bin/activate
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
