"""Every file in pretrain_configs loads, fits its processes, and is as large as its name says."""

import re
from pathlib import Path

import pytest

from megaroute.config.checks import check_config
from megaroute.config.load import load_config
from megaroute.config.sizes import num_parameters

FOLDER = Path(__file__).resolve().parents[2] / "pretrain_configs"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
LARGE = [file for file in FILES if not file.startswith(("debug/", "rivals/"))]
SIZES = {"408m": 408e6, "766m": 766e6, "1.5b": 1.48e9, "2.9b": 2.92e9, "5.8b": 5.79e9}
CONTROLS = [
    ("skip/skip-1.5b.yaml", "dense/dense-408m-control-of-skip-1.5b.yaml"),
    ("skip/skip-2.9b.yaml", "dense/dense-766m-control-of-skip-2.9b-and-5.8b.yaml"),
    ("skip/skip-5.8b.yaml", "dense/dense-766m-control-of-skip-2.9b-and-5.8b.yaml"),
    ("debug/cpu.yaml", "debug/cpu-dense.yaml"),
]


def test_all_kinds_are_there():
    assert {Path(file).parent.name for file in FILES} == {"debug", "dense", "rivals", "skip"}


@pytest.mark.parametrize("file", FILES)
def test_file_fits_its_processes(file):
    config = load_config(FOLDER / file)
    on_cpu = config.run.device == "cpu"
    for replicas in (1, 2) if on_cpu else (1, 2, 16):
        check_config(config, config.parallel.model_size * replicas, "gloo" if on_cpu else "nccl")


@pytest.mark.parametrize("file", LARGE)
def test_short_trial_with_another_layout_needs_no_further_keys(file):
    config = load_config(FOLDER / file, ["train.steps=1000", "parallel.tensor=4"])
    check_config(config, config.parallel.model_size, "nccl")


@pytest.mark.parametrize("file", FILES)
def test_run_has_the_name_of_its_file(file):
    assert load_config(FOLDER / file).run.name == Path(file).name.removesuffix(".yaml")


@pytest.mark.parametrize("file", LARGE)
def test_number_of_parameters_is_the_one_in_the_name(file):
    claim = SIZES[re.findall(r"\d+m|\d+\.\d+b", file)[0]]
    config = load_config(FOLDER / file)
    assert num_parameters(config.model, config.routing) == pytest.approx(claim, rel=0.01)


@pytest.mark.parametrize("skip, control", CONTROLS)
def test_skipping_run_executes_as_many_layers_as_its_control_has(skip, control):
    routed, dense = load_config(FOLDER / skip), load_config(FOLDER / control)
    routers = len(routed.routed_layers)
    executed = routed.model.num_layers - routers + routers * routed.routing.density
    assert dense.routed_layers == ()
    assert executed == pytest.approx(dense.model.num_layers, abs=1e-3)


@pytest.mark.parametrize("skip, control", CONTROLS)
def test_skipping_run_and_control_differ_in_depth_router_and_layout_only(skip, control):
    routed, dense = load_config(FOLDER / skip), load_config(FOLDER / control)
    assert dense.model.model_copy(update={"num_layers": routed.model.num_layers}) == routed.model
    assert dense.data == routed.data
    assert dense.optim == routed.optim
    assert dense.train.model_copy(update={"micro_batch": routed.train.micro_batch}) == routed.train
