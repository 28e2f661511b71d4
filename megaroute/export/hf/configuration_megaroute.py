"""Configuration of a language model in which every token decides, layer by layer, whether to be computed."""

from typing import Any

from transformers import PretrainedConfig


class MegarouteConfig(PretrainedConfig):
    """Shape and routing of an exported model.

    Args:
        hidden_act: `silu` or `gelu` (the exact one).
        mlp_gated: whether the MLP has a gate matrix.
        head_dim: width of one head.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_norm: whether every query and key head is normed before positions turn it.
        router: who decides: `gumbel`, `early_exit`, `mod`, `highway` or `random`; see MegarouteRouter.
        router_unit: what a router stands in front of: `layer`, `attention`, `mlp`, or `separate` (both branches).
        routed_layers: indices of the layers with routers.
        router_densities: share of tokens that each routed unit was trained to execute.
        router_multiplies: whether an executed branch is multiplied by the probability of executing.
        router_temperature: the logit is divided by it in that probability.
        router_seed: seed of the numbers that `random` draws.
        attend_across_documents: whether a token sees what is before the end-of-document token before it.
        num_pieces: ids that the tokenizer knows; the embedding may have more rows.
    """

    model_type = "megaroute"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        mlp_gated: bool = True,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        max_position_embeddings: int = 1024,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        tie_word_embeddings: bool = False,
        router: str = "gumbel",
        router_unit: str = "layer",
        routed_layers: tuple[int, ...] = (),
        router_densities: tuple[float, ...] = (),
        router_multiplies: bool = False,
        router_temperature: float = 1.0,
        router_seed: int = 0,
        attend_across_documents: bool = True,
        num_pieces: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 1,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.mlp_gated = mlp_gated
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.router = router
        self.router_unit = router_unit
        self.routed_layers = list(routed_layers)
        self.router_densities = list(router_densities)
        self.router_multiplies = router_multiplies
        self.router_temperature = router_temperature
        self.router_seed = router_seed
        self.attend_across_documents = attend_across_documents
        self.num_pieces = num_pieces or vocab_size
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs
        )

    @property
    def routed_parts(self) -> tuple[str, ...]:
        """What of a routed layer carries a router."""
        return ("attention", "mlp") if self.router_unit == "separate" else (self.router_unit,)
