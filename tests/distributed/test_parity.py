"""P1: one routing, whatever the layout.  Every layout starts from one checkpoint and trains 20 steps in fp32."""

from pathlib import Path

import pytest
from training import Ranks, assert_same_run, numbers, write_config

# Five layouts in one start are many steps, for two busy cores; a hang still ends here.
pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
LAYOUTS = {
    1: {"one": []},
    2: {
        "tp2": [TP],
        "tp2-sp": [TP, SP],
        "pp2": [PP],
        "pp2-interleaved": [PP, "parallel.virtual_pipeline=2"],
        "dp2": [],
    },
    4: {"tp2-pp2": [TP, PP]},
    8: {"tp2-pp2-dp2-sp": [TP, PP, SP, "train.micro_batch=1"]},
}
STEPS = 20
SEED_STEPS = 2


@pytest.fixture(scope="module")
def ranks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Ranks whose run directory holds a checkpoint, with AdamW moments, that one process wrote."""
    folder = tmp_path_factory.mktemp("parity")
    ranks = Ranks(write_config(folder, corpus), folder)
    ranks.train(1, {"seed": []}, SEED_STEPS, save=["seed"])
    return ranks


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> dict[str, list[list[dict]]]:
    runs = {"exact": [], "keep_all": ["routing.force=keep_all"], "keep_none": ["routing.force=keep_none"]}
    return ranks.train(1, runs, STEPS)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_losses_gradients_and_decisions_do_not_depend_on_the_layout(ranks, reference, world_size):
    runs = {
        f"{name}, recompute {recompute}": [*layout, f"train.recompute={recompute}"]
        for name, layout in LAYOUTS[world_size].items()
        for recompute in ("none", "full")
    }
    runs |= {f"{name}, keep_none": [*layout, "routing.force=keep_none"] for name, layout in LAYOUTS[world_size].items()}
    if world_size <= 2:
        runs |= {
            f"{name}, recompute selective": [*layout, "train.recompute=selective"]
            for name, layout in LAYOUTS[world_size].items()
        }
    results = ranks.train(world_size, runs, STEPS, timeout_s=800)
    for name, result in results.items():
        expected = reference["keep_none" if "keep_none" in name else "exact"]
        _assert_same(name, result, expected)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_the_micro_batch_size_changes_nothing(ranks, reference, size):
    result = ranks.train(1, {"cut": [f"train.micro_batch={size}"]}, STEPS)["cut"]
    _assert_same(f"micro-batch {size}", result, reference["exact"])


def test_masked_dispatch_trains_the_same_run(ranks, reference):
    result = ranks.train(1, {"masked": ["routing.dispatch.mode=masked"]}, STEPS)["masked"]
    _assert_same("masked", result, reference["exact"])


def test_a_layout_that_keeps_nothing_differs_from_one_that_keeps_everything(reference):
    # The comparisons above mean something only if routing matters to the loss.
    none, everything = numbers(reference["keep_none"]), numbers(reference["keep_all"])
    assert abs(none[-1]["loss"] - everything[-1]["loss"]) > 1e-3
    assert none[0]["density"] == [0.0, 0.0, 0.0] and everything[0]["density"] == [1.0, 1.0, 1.0]


def _assert_same(name: str, result: list[list[dict]], expected: list[list[dict]]) -> None:
    assert [step["step"] for step in numbers(result)] == list(range(SEED_STEPS + 1, SEED_STEPS + STEPS + 1))
    assert_same_run(name, result, expected)
