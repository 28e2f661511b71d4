"""How a run routes, in one line."""

from megaroute.config.routing_checks import LEARNED_BINARY
from megaroute.metrics.formats import percent
from megaroute.metrics.run_view import RunView

UNITS = {
    "attention": "in front of attention",
    "mlp": "in front of the MLP",
    "separate": "attention and MLP each their own",
}
"""What is said of routing.unit; a router in front of the whole layer is the method's."""


def about(run: RunView) -> str:
    """A sentence or two about the kind of model that a report shows."""
    if not run.history.train or run.skips:
        return (
            "A language model in which every token decides, layer by layer, whether to be computed. Density is the "
            "share of tokens that a layer, or a branch of it, with a router executes; skipped tokens pass it unchanged."
        )
    if run.router == "moe":
        return (
            "A language model in which every token chooses among experts in place of an MLP. Density is the share of "
            "tokens that at least one of their experts computed; the others found no capacity and pass the MLP by."
        )
    if run.router == "highway":
        return "A language model in which every token executes every layer, and a soft gate says how much of it counts."
    return "A language model without routers: every token executes every layer."


def routing_text(run: RunView) -> str:
    """Which layers carry a router, who decides, how the kept tokens are computed, and what holds the density."""
    if not run.units:
        return "no layer carries a router: every token executes every layer"
    layers = tuple(sorted({int(unit.split()[0]) for unit in run.units}))
    of = f"{len(layers)} of {run.num_layers} layers" if run.num_layers else f"{len(layers)} layers"
    parts = [f"{of} carry a router ({_ranges(layers)})", UNITS.get(str(run.setting("routing.unit")), "")]
    if run.router == "moe":
        parts = [f"{of} have experts in place of the MLP ({_ranges(layers)})"]
    if target := target_text(run):
        parts.append(f"target density {target}")
    if router := run.setting("routing.router"):
        parts += [f"router {router}", *_experts(run), *_dispatch(run), *_learning(run)]
    return ", ".join(filter(None, parts))


def _experts(run: RunView) -> list[str]:
    if run.router != "moe" or run.routing is None:
        return []
    moe = run.routing.moe
    return [f"{moe.experts} experts, {moe.top_k} a token, capacity factor {moe.capacity_factor:g}"]


def _dispatch(run: RunView) -> list[str]:
    routing = run.routing
    if routing is None or not run.skips:
        return []
    parts = [f"dispatch {routing.dispatch.mode}"]
    if routing.dispatch.mode == "capacity":
        parts.append(f"capacity factor {routing.capacity.factor:g} of each {routing.capacity.scope}")
    if routing.dispatch.exchange != "none":
        parts.append("exchange between replicas")
    return parts


def _learning(run: RunView) -> list[str]:
    """What a learned binary router learns from."""
    routing = run.routing
    if routing is None or routing.router not in LEARNED_BINARY:
        return []
    parts = [f"estimator {routing.estimator}", f"benefit {routing.benefit}"]
    parts.append(f"budget weight {routing.budget.weight:g}")
    if routing.controller.gain:
        parts.append(f"controller gain {routing.controller.gain:g}")
    return parts


def target_text(run: RunView) -> str:
    """The target density of the units, "50.0 %", a range, and where it started; empty when there is none."""
    targets = [target for target in run.targets() if target is not None]
    if not targets:
        return ""
    low, high = min(targets), max(targets)
    text = percent(low) if low == high else f"{percent(low)} to {percent(high)}"
    anneal = run.routing.density_anneal if run.routing is not None else None
    if anneal is None:
        return text
    return f"{text}, from {percent(anneal.start)} in steps {anneal.after:,} to {anneal.after + anneal.steps:,}"


def _ranges(layers: tuple[int, ...]) -> str:
    """2, 3, 4, 7 as "2-4, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
