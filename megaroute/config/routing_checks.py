"""Rules of the `routing` section that need other sections: arithmetic only."""

from collections.abc import Iterator
from itertools import pairwise

from megaroute.config.root import Config

Problems = Iterator[str]

LEARNED_BINARY = ("gumbel", "early_exit")
"""Routers that learn from a straight-through gradient and that a controller can correct: a logit's sign decides."""


def routing_problems(config: Config, replicas: int | None) -> Problems:
    """What contradicts itself in `routing`; `replicas` is the number of data-parallel replicas, where it is known."""
    yield from _layers(config)
    yield from _exchange(config, replicas)
    if config.routing.router == "dense":
        return
    for check in (_pattern, _densities, _router, _gradient, _capacity):
        yield from check(config)


def _layers(config: Config) -> Problems:
    layers, num_layers = config.routing.layers or (), config.model.num_layers
    if outside := [layer for layer in layers if layer >= num_layers]:
        yield (
            f"routing.layers has {outside[0]}, but model.num_layers {num_layers} counts layers 0 to {num_layers - 1}; "
            "remove it"
        )
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        yield f"routing.layers has {twice[0]} more than once, and a layer carries one router per unit; name it once"


def _pattern(config: Config) -> Problems:
    routing, num_layers = config.routing, config.model.num_layers
    if not config.routed_layers:
        if routing.layers is not None:
            reason = "routing.layers is empty"
        else:
            reason = (
                f"routing.first_dense {routing.first_dense} + routing.last_dense {routing.last_dense} >= "
                f"model.num_layers {num_layers}"
            )
        yield f"no layer carries a router ({reason}); free a layer, or say routing.router=dense"
    elif routing.densities is not None and len(routing.densities) != len(config.routed_layers):
        yield (
            f"routing.densities has {len(routing.densities)} targets for {len(config.routed_layers)} routed layers; "
            "give one for each, or use routing.density"
        )


def _densities(config: Config) -> Problems:
    routing, alarm = config.routing, config.routing.alarm
    if routing.density_anneal is not None and routing.density_anneal.start > 1:
        yield (
            f"routing.density_anneal.start {routing.density_anneal.start:g} > 1: a unit cannot execute more than every "
            "token; lower it"
        )
    if routing.router == "early_exit" and routing.densities is not None:
        for lower, upper in pairwise(routing.densities):
            if upper > lower:
                yield (
                    f"routing.densities has {upper:g} above {lower:g}, but with routing.router early_exit a token that "
                    "stopped stays stopped, so targets cannot rise with depth; give falling ones"
                )
                break
    if alarm.low >= alarm.high:
        yield (
            f"routing.alarm.low {alarm.low:g} >= routing.alarm.high {alarm.high:g}: every density would be an alarm; "
            "lower the first or raise the second"
        )


def _router(config: Config) -> Problems:
    routing = config.routing
    if routing.router == "mod" and not routing.mod.predictor and routing.causal_evaluation:
        yield (
            "routing.router mod takes the top of a whole sequence, later tokens included, and routing.mod.predictor "
            "false leaves it nothing else at inference; set routing.mod.predictor=true, or "
            "routing.causal_evaluation=false to validate with knowledge of later tokens"
        )
    if routing.router == "early_exit" and config.parallel.pipeline > 1:
        yield (
            f"routing.router early_exit with parallel.pipeline {config.parallel.pipeline}: a stage must know which "
            "tokens stopped in an earlier one, and stages send hidden states only; set parallel.pipeline=1"
        )
    if routing.router == "early_exit" and routing.unit != "layer":
        yield f"routing.router early_exit stops tokens at layers, not at unit {routing.unit}; set routing.unit=layer"
    if routing.router == "moe" and routing.unit != "mlp":
        yield f"routing.router moe replaces the MLP, not unit {routing.unit}; set routing.unit=mlp"
    if routing.router == "moe" and routing.moe.top_k > routing.moe.experts:
        yield f"routing.moe.top_k {routing.moe.top_k} > routing.moe.experts {routing.moe.experts}; raise the latter"
    if routing.router == "moe" and config.data.pads:
        yield (
            f"routing.router moe with data.packing {config.data.packing}: padding would be given to experts and count "
            "in their balance; set data.packing=concat"
        )
    if routing.router == "moe" and routing.force is not None:
        yield (
            f"routing.force {routing.force} overrules decisions to skip, but with routing.router moe no token is "
            "skipped; remove it"
        )
    if routing.controller.trend >= routing.controller.gain and routing.controller.trend > 0:
        yield (
            f"routing.controller.trend {routing.controller.trend:g} >= routing.controller.gain "
            f"{routing.controller.gain:g}: the density would swing ever wider; set a tenth of the gain"
        )
    if routing.controller.gain > 0 and routing.router not in LEARNED_BINARY:
        yield (
            f"routing.controller.gain {routing.controller.gain:g} has nothing to correct in routing.router "
            f"{routing.router}; set routing.controller.gain=0"
        )


def _gradient(config: Config) -> Problems:
    routing = config.routing
    if routing.benefit == "second_order" and (routing.router not in LEARNED_BINARY or routing.gate == "probability"):
        yield (
            f"routing.benefit second_order corrects the straight-through gradient, which routing.router "
            f"{routing.router} with routing.gate {routing.gate} has not; set routing.benefit=first_order"
        )
    if routing.gradient != "all":
        return
    if routing.benefit != "first_order":
        yield (
            f"routing.benefit {routing.benefit} is that of executed tokens, but routing.gradient all asks for skipped "
            "ones too; set routing.benefit=first_order or routing.gradient=executed"
        )
    if routing.router not in LEARNED_BINARY:
        yield (
            f"routing.gradient all is a straight-through gradient, which routing.router {routing.router} has not; set "
            "routing.gradient=executed"
        )
    if routing.dispatch.mode != "masked":
        yield (
            "routing.gradient all needs what skipped tokens would have become, but routing.dispatch.mode "
            f"{routing.dispatch.mode} does not compute it; set routing.dispatch.mode=masked or "
            "routing.gradient=executed"
        )
    if routing.gate != "straight_through":
        yield (
            f"routing.gradient all is defined for routing.gate straight_through, not {routing.gate}; change one of them"
        )


def _capacity(config: Config) -> Problems:
    routing, capacity = config.routing, config.routing.capacity
    if routing.dispatch.mode == "capacity" and routing.router in ("highway", "moe"):
        yield (
            f"routing.dispatch.mode capacity does not fit routing.router {routing.router}, which computes every token; "
            "set routing.dispatch.mode=exact"
        )
    if capacity.scope == "stage" and capacity.factor < 1:
        yield (
            f"routing.capacity.factor {capacity.factor:g} < 1 with routing.capacity.scope stage: the stage's budget "
            "would lie below its target, and early units would leave later ones nothing; set it to at least 1"
        )


def _exchange(config: Config, replicas: int | None) -> Problems:
    routing = config.routing
    if routing.dispatch.exchange == "none":
        return
    if routing.unit not in ("mlp", "separate") or routing.router in ("moe", "dense"):
        yield (
            f"routing.dispatch.exchange dp moves rows of binary-routed MLP units, but routing.router {routing.router} "
            f"has unit {routing.unit}; set routing.unit=mlp or separate, or routing.dispatch.exchange=none"
        )
    if routing.dispatch.mode != "exact":
        yield (
            f"routing.dispatch.exchange dp moves the rows of dispatch mode exact, not those of mode "
            f"{routing.dispatch.mode}, whose number is limited on each replica or that of all tokens; set "
            "routing.dispatch.exchange=none or routing.dispatch.mode=exact"
        )
    if replicas == 1:
        yield (
            "routing.dispatch.exchange dp needs at least two replicas to exchange rows, and parallel.data is 1; set "
            "routing.dispatch.exchange=none or start more processes"
        )
