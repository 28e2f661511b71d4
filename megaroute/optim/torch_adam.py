"""Megatron-core falls back to torch's AdamW without Transformer Engine and Apex; three faults of that path, mended.

Without these a checkpoint cannot be loaded, or is loaded and the run goes on with a wrong bias correction in silence.
"""

import functools
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def init_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its moments and step count now.

    torch's AdamW makes them in its first step, while DistributedOptimizer.state_dict, which every load calls, asserts
    that they are there.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                    inner.state[param].update(step=torch.tensor(0.0), **zeros)


def repair_load() -> None:
    """Make DistributedOptimizer load the step count: once per process, harmless to repeat.

    `_set_main_param_and_optimizer_states` copies every key of the state although the loaders drop "step" (KeyError),
    and `load_state_dict` puts one shared step tensor into all states, which AdamW then advances once per parameter.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "repaired", False):
        return

    @functools.wraps(original)
    def repaired(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"].clone(), **tensors}
        return original(self, model_param, tensors)

    repaired.repaired = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = repaired
