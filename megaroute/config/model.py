"""`model`: the shape of the network."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from megaroute.config.section import Section


class ModelConfig(Section):
    """A decoder-only Transformer: RMSNorm before each branch, rotary positions, grouped-query attention."""

    num_layers: PositiveInt
    """Number of Transformer layers, routed ones included."""
    hidden_size: PositiveInt
    """Width H of the residual stream."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_kv_heads: PositiveInt | None = None
    """Number of key and value heads (grouped-query attention); as many as query heads when not given.  A multiple of
    parallel.tensor, or a divisor of it: then tensor ranks share a head."""
    head_dim: PositiveInt | None = None
    """Width of one head; hidden_size / num_attention_heads when not given."""
    ffn_hidden_size: PositiveInt
    """Inner width of the MLP.  Gated activations have two matrices of this width before the third."""
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """MLP activation: gated SiLU, gated GELU, or plain GELU."""
    vocab_size: PositiveInt
    """Rows of the embedding; at least the number of pieces of the tokenizer."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias, as in Qwen2."""
    qk_norm: bool = False
    """RMSNorm of every query and key head before positions turn it, as in Qwen3."""
    tie_embeddings: bool = False
    """Use the input embedding as the output projection."""
    rope_base: PositiveInt = 10000
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get
    init_std / sqrt(2 * num_layers)."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, resolved."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one head, resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate matrix."""
        return self.activation != "gelu"

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} % num_attention_heads {self.num_attention_heads} = "
                f"{self.hidden_size % self.num_attention_heads}, must be 0 unless head_dim is given"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} % num_kv_heads {self.kv_heads} = "
                f"{self.num_attention_heads % self.kv_heads}, must be 0"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} must be even: rotary positions turn pairs of channels")
        return self
