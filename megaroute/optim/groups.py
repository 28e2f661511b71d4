"""Which weights have a learning rate and a weight decay of their own: those of the routers."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megaroute.config.root import Config

ROUTERS = ParamKey(name="*.router.*")
"""Weights of every kind of router, by their name in the model."""
# A checkpoint finds a group again by four of Megatron-core's fields, of which this is the one that says what the group
# is.  The others are its numbers, with which a run could not be resumed under another learning rate.
_MARK = "is_decoupled_lr"


def group_overrides(optimizer: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron-core's groups (norms do not decay), and one more for the routers, for `get_megatron_optimizer`."""
    mark: Any = {_MARK: True}
    return {**get_standard_config_overrides(optimizer), ROUTERS: mark}


def set_group_limits(config: Config, optimizer: MegatronOptimizer) -> None:
    """Write into every group the learning rates and the weight decay that the schedule starts from.

    They are the configuration's, at every step anew: a checkpoint brings back the values it was written with.
    """
    optim, routing = config.optim, config.routing
    for group in optimizer.param_groups:
        routers = group.get(_MARK, False)
        factor = routing.lr_factor if routers else 1.0
        decay = 0.0 if routers and not routing.weight_decay else optim.weight_decay
        group.update(max_lr=factor * optim.lr, min_lr=factor * optim.min_lr, start_wd=decay, end_wd=decay)
