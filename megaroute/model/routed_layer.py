"""The routed layer: the one seam between routing and Megatron-core.  Shapes as in attention.py."""

from functools import partial
from typing import Any, cast

from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megaroute.config.routing import PARTS, RoutingConfig
from megaroute.config.units import Unit
from megaroute.model.microbatch import MicroBatch
from megaroute.model.routed_unit import RoutedUnit
from megaroute.parallel.groups import data_group
from megaroute.routing.context import RoutingContext
from megaroute.routing.dispatch import gather
from megaroute.routing.exchange import balanced
from megaroute.routing.plan import Plan

Sight = tuple[Tensor, Tensor | None]
"""Rotary angles of all positions, and where the document of each token starts, see MicroBatch."""


class RoutedLayer(TransformerLayer):
    """A Transformer layer in which every token decides whether the layer, or either branch, is computed for it.

    K and V are computed for every token; Q, attention output and MLP for executed tokens only, at their own positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        routing: RoutingConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        routing = routing or RoutingConfig()
        layer = self.layer_number - 1
        targets = dict(zip(routing.units(config.num_layers), routing.targets(config.num_layers), strict=True))
        self.units = nn.ModuleDict()
        for part in PARTS[routing.unit]:
            unit = Unit(layer, part)
            self.units[part] = RoutedUnit(routing, unit, targets[unit], config, self.tp_group)
        self._exchanges = routing.dispatch.exchange == "dp"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: MicroBatch | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, B, H] -> ([s, B, H], None).

        `packed_seq_params` is the micro-batch whose `routing` is read and filled; without one nothing is recorded.
        """
        assert rotary_pos_emb is not None
        micro = packed_seq_params or MicroBatch()
        x, sight = hidden_states, (rotary_pos_emb, micro.starts_SB)
        if "layer" in self.units:
            return self._unit("layer", x, self.input_layernorm(x), partial(self._both, sight=sight), micro), None
        x = self._unit("attention", x, self.input_layernorm(x), partial(self._attend, sight=sight), micro)
        transform = partial(self._transform, context=micro.routing)
        return self._unit("mlp", x, self.pre_mlp_layernorm(x), transform, micro), None

    def _unit(self, part: str, x: Tensor, h: Tensor, compute: Any, micro: MicroBatch) -> Tensor:
        """One branch or both, for the tokens that its router keeps, or for all when it has none."""
        if part in self.units:
            return self.units[part](x, h, compute, micro.routing, micro.starts_SB)
        return x + compute(x.reshape(-1, x.shape[-1]), h, None).view_as(x)

    def _both(self, x_RH: Tensor, h: Tensor, plan: Plan | None, sight: Sight) -> Tensor:
        """What attention, then MLP, add to the rows `x_RH`."""
        attended_RH = self._attend(x_RH, h, plan, sight)
        x_RH = x_RH + attended_RH
        if self.recompute_mlp and self.training:
            return attended_RH + tensor_parallel.checkpoint(self._normed_mlp, False, x_RH)
        return attended_RH + self._normed_mlp(x_RH)

    def _attend(self, x_RH: Tensor, h: Tensor, plan: Plan | None, sight: Sight) -> Tensor:
        """What attention adds to the rows `x_RH`."""
        return self.self_attention(h, plan, *sight).view_as(x_RH)

    def _transform(self, x_RH: Tensor, h: Tensor, plan: Plan | None, context: RoutingContext) -> Tensor:
        """What the MLP adds to the rows `x_RH`, whose normed values are in `h` already."""
        if plan is None:
            h_RH = h.reshape(-1, h.shape[-1])
        else:
            place = cast(RoutedUnit, self.units["mlp"]).place
            h_RH = gather(h, plan.local(place.chunk).rows_r - place.chunk * h.shape[0] * h.shape[1])
        mlp = partial(self._exchanged_mlp, context=context) if self._exchanges else self._mlp
        if self.recompute_mlp and self.training:
            return tensor_parallel.checkpoint(mlp, False, h_RH)
        return mlp(h_RH)

    def _exchanged_mlp(self, h_RH: Tensor, context: RoutingContext) -> Tensor:
        """The MLP, with rows moved between replicas so that all compute equally many."""
        out_RH, rows = balanced(h_RH, self._mlp, data_group())
        cast(RoutedUnit, self.units["mlp"]).note_rows(context, rows)
        return out_RH

    def _normed_mlp(self, x_RH: Tensor) -> Tensor:
        return self._mlp(self.pre_mlp_layernorm(x_RH))

    def _mlp(self, h_RH: Tensor) -> Tensor:
        return self.mlp(h_RH[:, None])[0][:, 0]
