# shellcheck shell=bash
# An example for a cluster with modules, InfiniBand and several GPUs per node.  Copy it, change it, and submit with
#
#   sbatch --export=ALL,MEGAROUTE_ENV=slurm/env/mycluster.sh ... slurm/pretrain.sbatch CONFIG

# What `make setup` was run with.  Modules that change under a running job are a reason to name versions.
module load python/3.11 cuda/12.8

. .venv/bin/activate

# The network interfaces of the ranks' first meeting and of gloo; without them a management network may be taken.
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0

# A collective that fails ends the rank, and does not leave it waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# One thread for each rank: the processor has little to do on a node with GPUs.
export OMP_NUM_THREADS=1

# srun's tasks share the processors of the node unless the site binds them well.
export MEGAROUTE_SRUN="--cpu-bind=none"

# Scratch of the node, where data.cache may be kept.
export TMPDIR="${SLURM_TMPDIR:-/tmp}"
