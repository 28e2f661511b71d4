"""What a step reports of routing does not depend on the layout, and says which rank computed what."""

from pathlib import Path

import pytest
from training import Ranks, numbers, write_config

STEPS = 3
TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
LAYOUTS = {2: {"tp2": [TP], "tp2-sp": [TP, SP]}, 4: {"pp2-dp2": [PP], "tp2-sp-dp2": [TP, SP], "tp2-pp2": [TP, PP]}}
ROUTINGS = {
    "separate": ["routing.unit=separate", "routing.budget.density=soft"],
    "moe": ["routing.router=moe", "routing.unit=mlp", "routing.controller.gain=0", "routing.moe.capacity_factor=0.6"],
    "capacity": ["routing.dispatch.mode=capacity", "routing.capacity.factor=0.7"],
}


@pytest.fixture(scope="module")
def ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("load")
    return Ranks(write_config(folder, corpus), folder)


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> dict[str, list[dict]]:
    """The steps of one process, by routing."""
    return {name: numbers(steps) for name, steps in ranks.train(1, ROUTINGS, STEPS).items()}


def runs(world_size: int) -> dict[str, list[str]]:
    """Layouts by routings; a capacity is one of slices under sequence parallelism, so that other tokens overflow."""
    return {
        f"{routing}, {layout}": [*routed, *degrees]
        for layout, degrees in LAYOUTS[world_size].items()
        for routing, routed in ROUTINGS.items()
        if routing != "capacity" or SP not in degrees
    }


@pytest.mark.parity
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_totals_do_not_depend_on_the_layout(ranks, reference, world_size):
    for name, result in ranks.train(world_size, runs(world_size), STEPS).items():
        routing, sliced = name.split(",")[0], "sp" in name
        for mine, theirs in zip(numbers(result), reference[routing], strict=True):
            ours, expected = mine["totals"], theirs["totals"]
            assert ours["soft"] == pytest.approx(expected["soft"], rel=1e-4), name
            exact = ["kept", "overflow", "choices", "tokens", "dense_pairs", "needed_pairs"]
            for field in exact if sliced else [*exact, "rows", "pairs"]:
                assert ours[field] == expected[field], f"{name}: {field}"
            assert mine["budget_loss"] == pytest.approx(theirs["budget_loss"], rel=1e-4), name
            if not sliced:  # slices are padded to equal sizes
                assert mine["flops"] == theirs["flops"], name
    overflow = [sum(reference[name][-1]["totals"]["overflow"]) for name in ROUTINGS]
    assert overflow[0] == 0 < min(overflow[1:])


def test_rows_are_those_of_their_rank(ranks):
    """Against the decisions that each rank has recorded."""
    runs = {"pp2-dp2": [PP, "routing.unit=separate"]}
    result = ranks.train(4, runs, STEPS)["pp2-dp2"]
    for step in zip(*result, strict=True):
        by_replica: dict[int, list[int]] = {}
        by_rank = []
        for rank, mine in enumerate(step):
            kept = {}
            for key, _, positions, _ in mine["decisions"]:
                kept[key] = kept.get(key, 0) + len(positions)
                by_replica.setdefault(key, [0, 0])[rank % 2] += len(positions)
            by_rank.append(sum(kept.values()) / 2)
        totals, dense = step[0]["totals"], step[0]["totals"]["tokens"] / 2
        assert totals["replica_rows"] == [by_replica[key] for key in sorted(by_replica)]
        # Ranks are laid out data first, then stages; the first of 4 layers has no router.
        stages = [[by_rank[0] + dense, by_rank[1] + dense], by_rank[2:]]
        assert step[0]["rank_rows"] == stages


def test_exchange_evens_out_the_rows_of_the_replicas(ranks):
    """Replicas that exchange rows compute equally many in every micro-batch, and keep the same tokens."""
    plain = ["routing.unit=mlp"]
    found = ranks.train(2, {"without": plain, "with": [*plain, "routing.dispatch.exchange=dp"]}, STEPS)
    for without, exchanged in zip(numbers(found["without"]), numbers(found["with"]), strict=True):
        assert exchanged["totals"]["kept"] == without["totals"]["kept"]
        assert all(first == second for first, second in exchanged["totals"]["replica_rows"])
        assert any(first != second for first, second in without["totals"]["replica_rows"])
        totals = exchanged["totals"]
        padding = [sum(rows) - kept for rows, kept in zip(totals["replica_rows"], totals["kept"], strict=True)]
        # At most one row a micro-batch, of which there are two a replica.
        assert all(0 <= rows <= 2 for rows in padding)
        assert exchanged["flops"]["padding"] == sum(padding) * 3 * 2 * 3 * 64 * 96
