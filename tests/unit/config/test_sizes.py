"""Parameter counts by arithmetic, against sums written out by hand."""

import pytest

from megaroute.config.model import ModelConfig
from megaroute.config.routing import RoutingConfig
from megaroute.config.sizes import layer_parameters, num_parameters, router_parameters


def test_layer_counts_every_matrix_once():
    model = ModelConfig(
        num_layers=2,
        hidden_size=10,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=6,
        ffn_hidden_size=7,
        vocab_size=50,
    )
    attention = 10 * 24 + 10 * 12 + 10 * 12 + 24 * 10
    assert layer_parameters(model) == 10 + 10 + attention + 3 * 10 * 7
    assert router_parameters(model, RoutingConfig()) == 2 * 10


def test_plain_activation_has_two_matrices():
    model = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, vocab_size=50, activation="gelu"
    )
    assert layer_parameters(model) == 2 * 8 + 4 * 64 + 2 * 8 * 16


@pytest.mark.parametrize("tied, embeddings", [(True, 1), (False, 2)])
def test_model_is_layers_routers_final_norm_and_embeddings(tied, embeddings):
    model = ModelConfig(
        num_layers=3, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, vocab_size=50, tie_embeddings=tied
    )
    expected = 3 * layer_parameters(model) + 2 * (2 * 8) + 8 + embeddings * 50 * 8
    assert num_parameters(model, RoutingConfig(first_dense=1)) == expected


@pytest.mark.parametrize(
    "routing, more",
    [
        ({"router": "dense"}, 0),
        ({"router": "random"}, 0),
        ({"router": "random_ltd"}, 0),
        ({"unit": "separate"}, 2 * 2 * 16),
        ({"router": "mod"}, 2 * 3 * 8),
        ({"router": "mod", "mod": {"predictor": False}}, 2 * 2 * 8),
        # 4 experts of a gated MLP 8 x 16 where one stood, and a router of 4 rows
        ({"router": "moe", "unit": "mlp"}, 2 * (3 * 3 * 8 * 16 + 4 * 8)),
        ({"router": "moe", "unit": "mlp", "moe": {"top_k": 2}}, 2 * (4 * 3 * 8 * 8 - 3 * 8 * 16 + 4 * 8)),
    ],
)
def test_every_router_counts_its_own_weights(routing, more):
    model = ModelConfig(num_layers=3, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, vocab_size=50)
    dense = num_parameters(model, RoutingConfig(router="dense"))
    assert num_parameters(model, RoutingConfig.model_validate({"first_dense": 1, **routing})) == dense + more
