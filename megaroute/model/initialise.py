"""Initial weights as a function of (seed, name of the weight): the same on every layout."""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megaroute.config.root import Config
from megaroute.routing.state import initial_std


def initialise(model: GPTModel, config: Config) -> None:
    """Fill the weights of one chunk in place.

    Every matrix is drawn whole, from a generator seeded by its global name, and this rank's part is cut out; so tensor
    and pipeline layouts start from equal weights.  Memory: the largest whole matrix at a time, in float32.
    """
    for value in model.sharded_state_dict().values():
        if isinstance(value, ShardedTensorFactory):  # gated MLPs store their two halves as two shards of one matrix
            for part in value.build():
                _fill(part, config)
        elif isinstance(value, ShardedTensor) and isinstance(value.data, torch.nn.Parameter):
            _fill(value, config)


@torch.no_grad()
def _fill(shard: ShardedTensor, config: Config) -> None:
    if "norm" in shard.key:
        shard.data.fill_(1.0)
        return
    if shard.key.endswith(".bias"):
        shard.data.zero_()
        return
    digest = hashlib.blake2b(f"{config.train.seed}/{shard.key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    whole = torch.empty(shard.global_shape).normal_(0.0, _std(shard.key, config), generator=generator)
    here = tuple(
        slice(offset, offset + size) for offset, size in zip(shard.global_offset, shard.local_shape, strict=True)
    )
    shard.data.copy_(whole[here])


def _std(key: str, config: Config) -> float:
    if key.endswith("router.weight"):
        return initial_std(config.routing.init_logit_std, config.model.hidden_size)
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.model.init_std / math.sqrt(2.0 * config.model.num_layers)
    return config.model.init_std
