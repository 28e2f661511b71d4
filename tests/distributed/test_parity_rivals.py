"""P1 for every unit, router and dispatch: one process is any layout that its definition allows."""

from pathlib import Path

import pytest
from training import Ranks, assert_same_run, numbers, write_config

# Many runs share three starts of processes, for two busy cores; a hang still ends here.
pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

STEPS = 10
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2": ["parallel.pipeline=2"],
    "dp2": [],
}
FOUR = {
    "tp2-sp, pp2": ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
    "pp2 interleaved, dp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch=1"],
}
IN_FOUR = ("separate", "mlp", "second_order", "mod")
EVERYWHERE = ("tp2-sp", "pp2", "dp2")
FIXED = "routing.controller.gain=0"
"""The controller of the tiny run has nothing to correct in routers that do not learn to skip."""

CASES = {
    # name: (overrides, layouts)
    "attention": (["routing.unit=attention"], EVERYWHERE),
    "mlp": (["routing.unit=mlp"], EVERYWHERE),
    # One element's gradient is 0 but for rounding: divided by its size, it would move that weight by the learning rate.
    "separate": (["routing.unit=separate", "optim.eps=1e-6"], EVERYWHERE),
    "random": (["routing.router=random", FIXED], EVERYWHERE),
    "highway": (["routing.router=highway", "routing.unit=separate", FIXED], EVERYWHERE),
    "mod": (["routing.router=mod", FIXED], EVERYWHERE),
    "random_ltd": (["routing.router=random_ltd", "routing.unit=separate", FIXED], EVERYWHERE),
    # With room for all: who of two nearly equal tokens is the last to find room is a matter of rounding.
    "moe": (
        ["routing.router=moe", "routing.unit=mlp", "routing.moe={top_k: 2, capacity_factor: 4}", FIXED],
        EVERYWHERE,
    ),
    # A stage would have to know which tokens stopped in an earlier one.
    "early_exit": (["routing.router=early_exit", "routing.densities=[0.8, 0.6, 0.4]"], ("tp2-sp", "dp2")),
    "second_order": (
        ["routing.benefit=second_order", "routing.estimator=st_sigmoid", "routing.controller.trend=0.2"],
        EVERYWHERE,
    ),
    "soft": (["routing.budget.density=soft", "routing.gate=probability"], EVERYWHERE),
    "annealed": (
        [
            "routing.density_anneal={start: 1, steps: 6}",
            "routing.temperature_anneal={start: 3, steps: 6}",
            "routing.noise_anneal={start: 0.1, steps: 6}",
        ],
        EVERYWHERE,
    ),
    # With so few rows some tokens find no room; parts of a sequence have rows of their own.
    "capacity": (["routing.dispatch.mode=capacity", "routing.capacity.factor=0.8"], ("tp2", "pp2", "dp2")),
    # The top 16 of 64 tokens: they fit into the 32 rows of the sequence, and into the 16 of either half.
    "roomy": (
        [
            "routing.router=mod",
            "routing.density=0.25",
            "routing.dispatch.mode=capacity",
            "routing.capacity.factor=1.5",
            FIXED,
        ],
        ("tp2-sp",),
    ),
}
TOLERANCE = {
    # Where a loss is made of probabilities rather than of counts, it has their rounding, all the more near its least.
    "soft": {"budget": 1e-5},
    # So does the gradient of a softmax over experts; losses and decisions are held as everywhere.
    "moe": {"budget": 1e-5, "gradient": 1e-4},
}
EXCHANGE = ["routing.unit=mlp", "routing.dispatch.exchange=dp"]


@pytest.fixture(scope="module")
def ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("rivals")
    return Ranks(write_config(folder, corpus), folder)


@pytest.fixture(scope="module")
def one_process(ranks: Ranks) -> dict[str, list[list[dict]]]:
    runs = {name: overrides for name, (overrides, _) in CASES.items()}
    return ranks.train(1, runs, STEPS, timeout_s=400)


@pytest.fixture(scope="module")
def two_processes(ranks: Ranks) -> dict[str, list[list[dict]]]:
    runs = {
        f"{name}, {layout}": [*overrides, *LAYOUTS[layout]]
        for name, (overrides, layouts) in CASES.items()
        for layout in layouts
    }
    runs["mlp, dp2 with exchange"] = EXCHANGE
    return ranks.train(2, runs, STEPS, timeout_s=800)


@pytest.fixture(scope="module")
def four_processes(ranks: Ranks) -> dict[str, list[list[dict]]]:
    runs = {f"{name}, {layout}": [*CASES[name][0], *FOUR[layout]] for name in IN_FOUR for layout in FOUR}
    return ranks.train(4, runs, STEPS, timeout_s=800)


@pytest.mark.parametrize("layout", FOUR)
@pytest.mark.parametrize("name", IN_FOUR)
def test_nor_on_combined_layouts(one_process, four_processes, name, layout):
    tolerance = TOLERANCE.get(name, {})
    assert_same_run(f"{name}, {layout}", four_processes[f"{name}, {layout}"], one_process[name], **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_decisions_do_not_depend_on_the_layout(one_process, two_processes, name):
    for layout in CASES[name][1]:
        tolerance = TOLERANCE.get(name, {})
        assert_same_run(f"{name}, {layout}", two_processes[f"{name}, {layout}"], one_process[name], **tolerance)


def test_exchange_between_replicas_changes_nothing_but_where_rows_are_computed(one_process, two_processes):
    exchanged, plain = two_processes["mlp, dp2 with exchange"], two_processes["mlp, dp2"]
    assert_same_run("exchange", exchanged, one_process["mlp"])
    rows = [[step["rows"] for step in numbers(run)] for run in (exchanged, plain)]
    assert rows[0] != rows[1], "replicas kept equally many rows: nothing was exchanged"


def test_the_cases_are_different_runs(one_process):
    losses = {name: numbers(run)[-1]["loss"] for name, run in one_process.items()}
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)


def test_capacity_was_too_small_for_some(one_process):
    kept = [density for step in numbers(one_process["capacity"]) for density in step["density"]]
    assert max(kept) <= 0.5  # 0.8 * 0.5 * 64 = 26 tokens, rounded up to 32 of 64
    assert all(sum(step["totals"]["overflow"]) > 0 for step in numbers(one_process["capacity"]))
