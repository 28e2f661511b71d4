"""Learning rate and batch size as functions of the step."""

from typing import Protocol

from megatron.core.num_microbatches_calculator import (
    ConstantNumMicroBatchesCalculator,
    RampupBatchsizeNumMicroBatchesCalculator,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaroute.config.root import Config
from megaroute.optim.groups import set_group_limits

_DECAY = {"cosine": "cosine", "inverse_square_root": "inverse-square-root", "constant": "constant"}


class Schedule:
    """Sets the learning rate of a step.  Holds no state of its own: a resumed run needs nothing but the step."""

    def __init__(self, config: Config, optimizer: MegatronOptimizer) -> None:
        optim = config.optim
        self._config, self._optimizer = config, optimizer
        set_group_limits(config, optimizer)
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=optim.warmup_steps,
            lr_decay_steps=optim.decay_steps or config.train.steps,
            lr_decay_style=_DECAY[optim.decay],
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set(self, step: int) -> float:
        """Set the learning rates of `step`, counted from 1, so that no step runs at a rate of 0; returns the model's.

        Routers have routing.lr_factor times that rate.
        """
        set_group_limits(self._config, self._optimizer)
        self._scheduler.num_steps = step
        self._scheduler.step(0)
        return self._scheduler.get_lr({"max_lr": self._scheduler.max_lr, "min_lr": self._scheduler.min_lr})


class BatchSize(Protocol):
    """Megatron-core's calculators of micro-batches per step."""

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Take note of the samples consumed so far."""

    def get(self) -> int:
        """Micro-batches of one replica in the coming step."""


def batch_size(config: Config, data_parallel: int) -> BatchSize:
    """The number of micro-batches per step, constant or growing by `train.rampup`."""
    train = config.train
    if train.rampup is None:
        return ConstantNumMicroBatchesCalculator(
            train.global_batch, train.micro_batch, data_parallel, decrease_batch_size_if_needed=False, rank=1
        )
    return RampupBatchsizeNumMicroBatchesCalculator(
        train.global_batch,
        train.micro_batch,
        data_parallel,
        decrease_batch_size_if_needed=False,
        rank=1,  # any rank but 0, which would print
        start_global_batch_size=train.rampup.start,
        batch_size_increment=train.rampup.increment,
        ramup_samples=train.rampup.samples,
    )
