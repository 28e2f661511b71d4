"""A routed layer as one would write it on a page: every token, every branch, float64, gradients by autograd.

Nothing of the product is used but its configuration and its noise.  Names of weights are those of the product's layer.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaroute.config.routing import PARTS
from megaroute.config.units import Unit
from megaroute.routing.noise import uniform

ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu}


class PlainLayer:
    """y = x + g * (Block(x) - x) for every token of layer 0, where g says by a formula what the router is."""

    def __init__(self, config: Any, weights: dict[str, Tensor], at: Any, training: bool) -> None:
        """`weights` by name, float64; `at` is the micro-batch's routing context."""
        self.model, self.routing, self.weights, self.at, self.training = (
            config.model,
            config.routing,
            weights,
            at,
            training,
        )
        self.keep_SB: dict[str, Tensor] = {}
        self.aside: Tensor = torch.zeros((), dtype=torch.double)
        """What the router's own losses add to the loss: budget, predictor."""

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, H] -> [S, B, H]."""
        if PARTS[self.routing.unit] == ("layer",):
            attended = x + self.attention(self.norm("input", x))
            block = attended + self.mlp(self.norm("pre_mlp", attended))
            return x + self.gate("layer", self.norm("input", x))[..., None] * (block - x)
        h = self.norm("input", x)
        x = x + self.gate("attention", h)[..., None] * self.attention(h)
        h = self.norm("pre_mlp", x)
        return x + self.gate("mlp", h)[..., None] * self.mlp(h)

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.model.norm_eps).rsqrt()
        return x * scale * self.weights[f"{name}_layernorm.weight"]

    def attention(self, h: Tensor) -> Tensor:
        seq, batch, _ = h.shape
        heads, groups, width = self.model.num_attention_heads, self.model.kv_heads, self.model.head_size
        q = (h @ self.weights["self_attention.linear_q.weight"].T).view(seq, batch, heads, width)
        kv = (h @ self.weights["self_attention.linear_kv.weight"].T).view(seq, batch, groups, 2 * width)
        k, v = kv.split(width, -1)
        k, v = (part.repeat_interleave(heads // groups, dim=2) for part in (self.turned(k), v))
        score = torch.einsum("sbnd,tbnd->bnst", self.turned(q), k) / math.sqrt(width)
        later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        mean = torch.einsum("bnst,tbnd->sbnd", score.masked_fill(later, -math.inf).softmax(-1), v)
        return mean.reshape(seq, batch, heads * width) @ self.weights["self_attention.linear_proj.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        """Rotary position: pairs (i, i + D/2) turn by position / base^(2i / D)."""
        width = x.shape[-1]
        rate = self.model.rope_base ** (-torch.arange(0, width, 2, dtype=torch.double) / width)
        angle = (torch.arange(x.shape[0], dtype=torch.double)[:, None] * rate)[:, None, None]
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def mlp(self, h: Tensor) -> Tensor:
        inner, act = h @ self.weights["mlp.linear_fc1.weight"].T, ACTIVATIONS[self.model.activation]
        if self.model.activation == "gelu":
            inner = act(inner)
        else:
            left, right = inner.chunk(2, -1)
            inner = act(left) * right
        return inner @ self.weights["mlp.linear_fc2.weight"].T

    def gate(self, part: str, h: Tensor) -> Tensor:
        """g [S, B]; 1 for a branch without a router."""
        if part not in PARTS[self.routing.unit]:
            return torch.ones(h.shape[:2], dtype=torch.double)
        hard, g = getattr(self, f"_{self.routing.router}")(part, h)
        self.keep_SB[part] = hard
        return g

    def _uniform(self, part: str, seq: int) -> Tensor:
        samples, step = self.at.samples_B, self.at.step
        if not self.training:
            samples, step = torch.zeros_like(samples), 0
        return uniform(self.at.seed, step, Unit(0, part).key, samples, torch.arange(seq)).double()

    def _logit(self, part: str, h: Tensor) -> Tensor:
        skip, execute = self.weights[f"units.{part}.router.weight"]
        return h @ execute - h @ skip

    def _gumbel(self, part: str, h: Tensor) -> tuple[Tensor, Tensor]:
        z, u = self._logit(part, h), self._uniform(part, len(h))
        noise = torch.log(u / (1 - u)) if self.training else torch.zeros_like(u)
        hard = z + noise > 0
        p = torch.sigmoid((z + noise if self.routing.estimator == "st_gumbel" else z) / self.routing.temperature)
        if self.training:  # the share of executed tokens before the first step is taken to be one half
            slope = 2 * self.routing.budget.weight * (0.5 - self.routing.density)
            self.aside = self.aside + self.at.budget_scale * slope * p.mean()
        if self.routing.gate == "probability":
            return hard, hard * p
        carrier = p - p.detach()
        if self.routing.benefit == "second_order":
            tokens = hard.numel() / self.at.budget_scale

            def worth(s: Tensor) -> Tensor:
                return torch.where(s > 1, 0.5, torch.where(s < -1, -1.5, s - s**2 / 2))

            carrier.register_hook(lambda slope: worth(tokens * slope) / tokens)
        straight_through = hard + carrier
        return hard, straight_through if self.routing.gradient == "all" else hard * straight_through

    _early_exit = _gumbel

    def _random(self, part: str, h: Tensor) -> tuple[Tensor, Tensor]:
        hard = self._uniform(part, len(h)) < self.routing.density
        return hard, hard.double()

    def _random_ltd(self, part: str, h: Tensor) -> tuple[Tensor, Tensor]:
        count = round(self.routing.density * len(h)) if self.training else len(h)
        hard = torch.zeros(h.shape[:2], dtype=torch.bool)
        hard.scatter_(0, self._uniform(part, len(h)).topk(count, dim=0, largest=False).indices, True)
        return hard, hard.double()

    def _highway(self, part: str, h: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.sigmoid(self._logit(part, h))
        return torch.ones_like(p, dtype=torch.bool), p

    def _mod(self, part: str, h: Tensor) -> tuple[Tensor, Tensor]:
        z = self._logit(part, h)
        predicted = h.detach() @ self.weights[f"units.{part}.router.predictor"][0]
        if self.training:
            top = z.topk(round(self.routing.density * len(h)), dim=0).indices
            hard = torch.zeros(z.shape, dtype=torch.bool).scatter(0, top, True)
        else:
            hard = predicted > 0
        entropy = F.binary_cross_entropy_with_logits(predicted, hard.double())
        self.aside = self.aside + self.at.budget_scale * entropy
        return hard, hard * torch.sigmoid(z)
