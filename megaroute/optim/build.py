"""Wrap the model for gradient reduction and build Megatron-core's distributed optimizer."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from megaroute.config.root import Config
from megaroute.model.spec import DTYPES
from megaroute.optim.groups import group_overrides
from megaroute.optim.torch_adam import init_state, repair_load


def wrap(config: Config, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Chunks in their training precision, with gradients accumulated and reduced in float32."""
    transformer = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,  # the step itself decides, on all ranks alike, and can skip the update
    )
    modules: list[Any] = list(chunks)
    if config.train.precision != "fp32":
        modules = [Float16Module(chunk.config, chunk) for chunk in chunks]
    wrapped = [
        DistributedDataParallel(chunk.config, ddp, module, disable_bucketing=index > 0)
        for index, (chunk, module) in enumerate(zip(chunks, modules, strict=True))
    ]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    assert transformer.finalize_model_grads_func is not None
    return wrapped


def build_optimizer(config: Config, wrapped: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with float32 master weights; its state is sharded over the replicas."""
    repair_load()
    settings = optimizer_config(config)
    optimizer = get_megatron_optimizer(settings, wrapped, config_overrides=group_overrides(settings))
    init_state(optimizer)
    for chunk in wrapped:
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def optimizer_config(config: Config) -> OptimizerConfig:
    """Megatron-core's configuration for ours."""
    optim, precision = config.optim, config.train.precision
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=True,
    )
