"""Routers to try, and micro-batches to try them on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.context import RoutingContext
from megaroute.routing.routers import Place, Router, build_router

HIDDEN = 16


@pytest.fixture
def make() -> Callable[..., Router]:
    """`make("mod", target=0.3, layer=2, key=value, ...)`: a router with drawn weights, in training."""

    def make(name: str, target: float = 0.5, layer: int = 2, **routing: Any) -> Router:
        config = RoutingConfig.model_validate({"router": name, **routing})
        router = build_router(config, Unit(layer, "layer"), target, HIDDEN)
        generator = torch.Generator().manual_seed(layer)
        for weight in router.parameters():
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
        return router.train()

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """`tokens(S, B, seed)`: float32 [S, B, 16]."""
    return lambda seq, batch, seed=0: torch.randn(seq, batch, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def context() -> Callable[..., RoutingContext]:
    """`context(B, step=.., ...)`: the micro-batch of the samples from 40 on."""
    return lambda batch, **fields: RoutingContext(
        **{"seed": 3, "step": 5, "samples_B": torch.arange(40, 40 + batch), "budget_scale": 1.0, **fields}
    )


@pytest.fixture
def decide() -> Callable[..., Tensor]:
    """`decide(router, h, context, place)`: its decisions, bool [s, B]."""
    return lambda router, h, context, place=None: router.decide(router.logits(h), h, place or Place(), context).keep_sB


@pytest.fixture
def slices() -> Callable[..., list[tuple[Place, Tensor]]]:
    """`slices(router, h, chunks)`: what each tensor rank has under sequence parallelism.

    Its `whole` puts together what all ranks have, which here are the logits of the whole sequence.
    """

    def slices(router: Router, h: Tensor, chunks: int) -> list[tuple[Place, Tensor]]:
        with torch.no_grad():
            logit = router.logits(h)
        whole = logit[0] if logit is not None and logit.dim() == 3 else logit
        return [(Place(chunk, chunks, lambda _: whole), part) for chunk, part in enumerate(h.chunk(chunks))]

    return slices
