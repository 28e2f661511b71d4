"""How DeepSpeed's universal checkpoints describe a parameter: the keys that say how tensor ranks share it.  No torch.

Names are those of Megatron-core's model, `decoder.layers.0.mlp.linear_fc1.weight`.  The names of keys are DeepSpeed's
(deepspeed.checkpoint.constants).
"""

import re
from collections.abc import Iterable
from typing import Any

DEEPSPEED = "0.19.8"
"""Release whose loader the files are written for; it wants one in them."""

VOCABULARY = "vocabulary_parameter_patterns"
TWO_MATRICES = "parameter_with_2_sub_params_cat_dim_0"
ROW_PARALLEL = "parameter_with_row_parallelism_patterns"
REPLICATED = "tp_replicated_parameter_patterns"

_PATTERNS = {
    VOCABULARY: (r"embedding\.word_embeddings\.weight$", r"output_layer\.weight$"),
    TWO_MATRICES: (r"decoder\.layers\.\d+\.mlp\.(experts\.\d+\.)?linear_fc1\.weight$",),
    ROW_PARALLEL: (
        r"decoder\.layers\.\d+\.self_attention\.linear_proj\.weight$",
        r"decoder\.layers\.\d+\.mlp\.(experts\.\d+\.)?linear_fc2\.weight$",
    ),
    REPLICATED: (r".*norm\.weight$", r".*\.router\."),
}


def patterns(names: Iterable[str], gated: bool) -> dict[str, list[str]]:
    """Regular expressions, from the start of a name, by what they say of parameters.

    Only those that match one of `names`: DeepSpeed's converter refuses others.  `gated` says whether the first matrix
    of an MLP is two, gate and up, one below the other; tensor ranks hold a share of each.
    """
    listed = list(names)
    found = {
        kind: [pattern for pattern in those if any(re.match(pattern, name) for name in listed)]
        for kind, those in _PATTERNS.items()
        if gated or kind != TWO_MATRICES
    }
    return {kind: those for kind, those in found.items() if those}


def keys_of(name: str, found: dict[str, list[str]]) -> dict[str, Any]:
    """What lies beside a parameter's tensor, from the `patterns` of the model.

    `cat_dim` is the axis along which tensor ranks share it, the first where nothing else is known of it.
    """

    def has(kind: str) -> bool:
        return any(re.match(pattern, name) for pattern in found.get(kind, ()))

    if has(REPLICATED):
        return {}
    keys: dict[str, Any] = {"cat_dim": 1 if has(ROW_PARALLEL) else 0}
    if has(TWO_MATRICES):
        keys["param_n_sub_params"] = 2
    if has(VOCABULARY):
        keys["vocab_tensor"] = True
    return keys
