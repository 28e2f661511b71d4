"""The update: gradient buffers, Megatron-core's distributed AdamW (ZeRO stage 1), learning-rate schedule."""
