"""The budget: a loss that pulls each unit's density to the target, and a controller for what the loss does not hold."""

from torch import Tensor

from megaroute.routing.gradient import add_gradient


def pull(
    probability_SB: Tensor,
    density: Tensor,
    target: float,
    weight: float,
    scale: float,
    tokens: float | Tensor,
    real_SB: Tensor | None = None,
) -> Tensor:
    """Returns the probabilities unchanged; their gradient gets that of the budget loss.

    With r the mean hard gate and the straight-through estimator, d/dp_i of weight * (r - P)^2 is
    2 * weight * (r - P) / tokens for every token i, executed or not.  The gradient is added where it arises, so it
    works on any pipeline stage without a loss that travels.

    Args:
        probability_SB: softmax probability of executing, of all tokens or of this rank's slice.
        density: scalar tensor r; its distance from the target scales the gradient.
        scale: loss scale / micro-batches per step.
        tokens: tokens of the micro-batch over all tensor ranks.
        real_SB: bool, False at padding, which has no part in the density.
    """
    gradient = 2.0 * weight * scale / tokens * (density.detach() - target)
    return add_gradient(probability_SB, gradient if real_SB is None else gradient * real_SB)


def correct(bias: Tensor, slope: Tensor, error: float, gain: float, trend: float) -> None:
    """One step of the controller, in place: slope -= trend * error, then bias += slope - gain * error.

    An integrator of the error alone, `trend` 0, stays behind by drift / gain where learning moves the logits by a
    steady drift each step.  The slope, a second integrator, comes to cancel the drift, and the error goes to 0.

    Args:
        error: density - target.
    """
    slope.sub_(trend * error)
    bias.add_(slope - gain * error)
