"""A small token-choice mixture of experts, the rival that gives every token compute of one size but other weights.

Scores, choice, capacity and load balance as in Switch Transformers (Fedus et al. 2021, arXiv 2101.03961).  With a
capacity limit, training is not causal: whether a token finds room depends on later tokens of its sample.  Inference
sets no limit and is causal.

Shapes: as in the package, and E experts, k experts per token, R pairs of token and expert that are computed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaroute.routing.context import UnitRecord
from megaroute.routing.gradient import add_gradient
from megaroute.routing.state import ExactBuffers


@dataclass(frozen=True, kw_only=True)
class ExpertRecord(UnitRecord):
    """What a layer of experts did with one micro-batch.

    `keep_SB` are the tokens that at least one expert computed, `rows` the pairs of token and expert that were computed,
    `overflow` the pairs of this rank's slice that found no room, `counts_E` the pairs of each expert before the limit.
    """

    chosen_SBE: Tensor
    """bool [S, B, E], the k experts of each token."""
    kept_SBE: Tensor
    """bool [S, B, E], those of them that had room."""
    probability_E: Tensor
    """float32 [E], mean probability of each expert over the whole micro-batch."""


@dataclass(frozen=True)
class ExpertPlan:
    """Rows of the flattened [S * B] micro-batch that experts compute, one expert after the other."""

    rows_R: Tensor
    """int64 [R], rows in ascending order within each expert."""
    slots_R: Tensor
    """int64 [R], row * E + expert: where the pair's gate lies in the flattened [S * B * E]."""
    per_expert: tuple[int, ...]
    """Rows of each expert; sums to R."""


class ExpertState(ExactBuffers):
    """Memory of the router of a layer of experts."""

    share_E: Tensor
    """float32 [E]: share of all choices that fell on each expert in the previous step, over the global batch."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        # Before the first step all are equal, and the balance loss has no gradient.
        self.register_buffer("share_E", torch.full((experts,), 1.0 / experts))


class ExpertRouter(nn.Module):
    """Linear map from a token to the logits of the experts, without bias or noise; softmax in float32."""

    def __init__(self, hidden_size: int, experts: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size, dtype=dtype))
        self.state = ExpertState(experts)

    def forward(self, h_SBH: Tensor) -> Tensor:
        """Probabilities of the experts, float32 [S, B, E]."""
        return F.linear(h_SBH.float(), self.weight.float()).softmax(-1)

    @torch.no_grad()
    def update(self, counts_E: Tensor) -> None:
        """After a step: remember the load.  `counts_E` are the choices of the global batch; their sum is not 0."""
        self.state.share_E.copy_(counts_E.double() / counts_E.sum())


def choose(probability_SBE: Tensor, top_k: int) -> Tensor:
    """The `top_k` most probable experts of each token, bool [S, B, E]; of equal ones the first."""
    ranked = probability_SBE.detach().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(probability_SBE, dtype=torch.bool).scatter_(-1, ranked[..., :top_k], True)


def expert_capacity(factor: float, top_k: int, sequence_length: int, experts: int) -> int:
    """Rows of one sample that one expert may compute: ceil(factor * k * S / E), at most S."""
    exact = factor * top_k * sequence_length / experts
    return min(math.ceil(exact - 1e-9), sequence_length)  # a rounding error of the product must not add a row


def limit(probability_SBE: Tensor, chosen_SBE: Tensor, capacity: int) -> Tensor:
    """Of the choices, those with room, bool [S, B, E].

    Each expert takes at most `capacity` tokens of each sample, the most probable first and of equal ones the earlier.
    The limit is one of samples, so that it does not depend on which samples share a micro-batch.
    """
    score_SBE = probability_SBE.detach().masked_fill(~chosen_SBE, -1.0)
    first_CBE = score_SBE.sort(dim=0, descending=True, stable=True).indices[:capacity]
    return torch.zeros_like(chosen_SBE).scatter_(0, first_CBE, True) & chosen_SBE


def gates(probability_SBE: Tensor, chosen_SBE: Tensor, top_k: int) -> Tensor:
    """Factors of the experts' outputs, float32 [S, B, E], 0 for those not chosen.

    One expert per token: its probability, through which the router learns.  More: their probabilities divided by their
    sum, also when one of them had no room.
    """
    gate_SBE = probability_SBE * chosen_SBE
    return gate_SBE if top_k == 1 else gate_SBE / gate_SBE.sum(-1, keepdim=True)


def expert_plan(kept_SBE: Tensor) -> ExpertPlan:
    """The plan that computes the pairs of `kept_SBE`.  Reads the counts back to the host."""
    seq, batch, experts = kept_SBE.shape
    expert_R, row_R = kept_SBE.view(seq * batch, experts).T.nonzero(as_tuple=True)
    per_expert = tuple(kept_SBE.sum((0, 1)).tolist())
    return ExpertPlan(row_R, row_R * experts + expert_R, per_expert)


def sample_shares(chosen_SBE: Tensor) -> Tensor:
    """Share of the choices of each sample that fell on each expert, float32 [B, E]."""
    counts_BE = chosen_SBE.sum(0).float()
    return counts_BE / counts_BE.sum(-1, keepdim=True)


def balance_loss(share_E: Tensor, probability_E: Tensor, weight: float) -> Tensor:
    """weight * E * sum over experts of f_e * P_e; `weight` when all experts are alike, more when they are not.

    Args:
        share_E: f, share of all choices that fell on each expert.  With one choice per token this is the loss of Switch
            Transformers; with two it counts both, which is the load that there is to balance.
        probability_E: P, mean probability of each expert over the same tokens.  Both may be [.., E]; the result is
            then the mean over the leading dimensions.
    """
    return weight * share_E.shape[-1] * (share_E * probability_E).sum(-1).mean()


def balance(probability_SBE: Tensor, share_E: Tensor, weight: float, scale: float) -> Tensor:
    """Returns the probabilities unchanged; their gradient gets that of the balance loss.

    f is not differentiable, and d/dp_te of the loss is weight * E * f_e / tokens.  The gradient is added where it
    arises, as that of the density budget is.

    Args:
        probability_SBE: of all tokens.
        share_E: f, [E] or [B, E], such that cutting into micro-batches changes nothing: of each sample, or of the whole
            previous step.
        scale: loss scale / micro-batches per step.
    """
    seq, batch, experts = probability_SBE.shape
    return add_gradient(probability_SBE, weight * scale * experts / (seq * batch) * share_E)
