"""The budget: a loss that pulls each unit's density to the target, and a controller for what the loss does not hold."""

from torch import Tensor

from megaroute.routing.gradient import add_gradient


def pull(probability_SB: Tensor, density: Tensor, target: float, weight: float, scale: float, tokens: int) -> Tensor:
    """Returns the probabilities unchanged; their gradient gets that of the budget loss.

    With r the mean hard gate and the straight-through estimator, d/dp_i of weight * (r - P)^2 is
    2 * weight * (r - P) / tokens for every token i, executed or not.  The gradient is added where it arises, so it
    works on any pipeline stage without a loss that travels.

    Args:
        probability_SB: softmax probability of executing, of all tokens or of this rank's slice.
        density: scalar tensor r; its distance from the target scales the gradient.
        scale: loss scale / micro-batches per step.
        tokens: tokens of the micro-batch over all tensor ranks.
    """
    gradient = 2.0 * weight * scale / tokens * (density.detach() - target)
    return add_gradient(probability_SB, gradient)


def corrected_bias(bias: Tensor, density: Tensor, target: float, gain: float) -> Tensor:
    """One step of the integral controller: bias - gain * (density - target)."""
    return bias - gain * (density - target)
