"""The device under the run: CPU with gloo or CUDA with NCCL, and the port of Megatron-core to the former."""
