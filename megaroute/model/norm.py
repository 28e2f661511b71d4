"""RMSNorm for layer specs."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose weight carries Megatron-core's mark for sequence parallelism.

    Megatron-core's own wrapper refuses sequence parallelism.  The mark makes `finalize_model_grads` sum this weight's
    gradients over the tensor ranks, each of which sees other tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
