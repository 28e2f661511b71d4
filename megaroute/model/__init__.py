"""The network: Megatron-core's GPT model from layer specs, with routed layers where the configuration wants them."""
