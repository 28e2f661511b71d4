"""P2: a resumed run is the run that was never stopped."""

from pathlib import Path

import pytest
from training import Ranks, decisions, numbers, write_config

pytestmark = pytest.mark.data

LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
HALF = 4


@pytest.fixture(scope="module")
def interrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranks, list[list[dict]]]:
    """A run that stopped after HALF steps with a checkpoint, and the steps of one that went on without a stop."""
    folder = tmp_path_factory.mktemp("resume")
    ranks = Ranks(write_config(folder, corpus), folder)
    ranks.train(4, {"first half": LAYOUT}, HALF, save=["first half"])
    whole = ranks.train(4, {"whole": [*LAYOUT, f"run.directory={folder}/whole"]}, 2 * HALF)["whole"]
    return ranks, [rank[HALF:] for rank in whole]


def test_on_the_same_layout_every_number_and_decision_has_the_same_bits(interrupted):
    ranks, expected = interrupted
    resumed = ranks.train(4, {"resumed": LAYOUT}, HALF)["resumed"]
    assert resumed == expected


@pytest.mark.parametrize(
    "world_size, layout",
    [
        pytest.param(1, ["train.micro_batch=8"], id="one process"),
        pytest.param(2, ["train.micro_batch=1", "data.workers=2"], id="data parallel with workers"),
    ],
)
def test_on_another_layout_it_goes_on_with_the_same_samples_and_losses(interrupted, world_size, layout):
    ranks, expected = interrupted
    resumed = ranks.train(world_size, {"resumed": layout}, HALF)["resumed"]
    for a, b in zip(numbers(resumed), numbers(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["density"] == b["density"]
        assert a["digest"] == b["digest"]
    assert decisions(resumed) == decisions(expected)


def test_mixed_precision_resumes_with_the_same_bits(corpus, tmp_path):
    ranks = Ranks(write_config(tmp_path, corpus), tmp_path)
    bf16 = ["train.precision=bf16"]
    whole = ranks.train(2, {"whole": [*bf16, f"run.directory={tmp_path}/whole"], "half": bf16}, HALF, save=["half"])
    rest = ranks.train(2, {"rest": bf16}, HALF)["rest"]
    more = ranks.train(2, {"more": [*bf16, f"run.directory={tmp_path}/more"]}, 2 * HALF)["more"]
    assert whole["whole"] == whole["half"]
    assert rest == [rank[HALF:] for rank in more]
