"""A DeepSpeed engine goes on from an export with the very numbers of the run.

The engine is DeepSpeed's own, on the CPU with gloo, with ZeRO stages 1 and 2 over one and two replicas, in float32 and
bfloat16, with torch's AdamW, and without the operator for shared memory that DeepSpeed compiles for CPUs.  Not
exercised: DeepSpeed's fused Adam, accelerators, tensor ranks under an engine (their slices are in
tests/unit/export/test_to_universal.py), and the model's forward pass under the engine.
"""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from training import Ranks, write_config
from universal_worker import made_up_gradient

from megaroute.checkpoint.layout import read_cursor, resolve
from megaroute.config.load import load_config
from megaroute.export.to_universal import STATES, to_universal
from megaroute.launch.rundir import prepare_run_directory

pytestmark = [pytest.mark.parity, pytest.mark.slow]

WORKER = Path(__file__).resolve().parents[1] / "support" / "universal_worker.py"
STEPS = 3
RATE, BETAS, DECAY = 0.02, (0.8, 0.9), 0.05


def held_by(parts) -> dict[str, dict[str, torch.Tensor]]:
    """Master copy and moments of every parameter of a run in one process, straight from its optimizer."""
    optimizer = parts.optimizer
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    found = {}
    for name, parameter in parts.chunks[0].named_parameters():
        held = part._get_main_param_and_optimizer_states(parameter)
        found[name] = {
            key: held[key].detach().view(parameter.shape).clone() for key in ("param", "exp_avg", "exp_avg_sq")
        }
    return found


def engine_configuration(stage: int, precision: str, replicas: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": replicas,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "betas": BETAS, "weight_decay": DECAY, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": RATE, "warmup_num_steps": 10, "warmup_type": "linear"},
        },
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": True},
        "steps_per_print": 1000,
    }


@pytest.fixture
def trained(start, advance, save, tiny):
    """`trained("a.b=1", ..)`: parts of the tiny run after some steps, saved; its run directory is complete."""

    def trained(*overrides: str):
        config = tiny(*overrides)
        prepare_run_directory(config)
        parts = start(config)
        advance(parts, STEPS)
        save(parts)
        return parts

    return trained


def updated(name: str, held: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Master copy and moments after what the worker's update should be, by torch's AdamW alone."""
    parameter = torch.nn.Parameter(held["param"].clone())
    parameter.grad = made_up_gradient(name, parameter.shape).to(dtype).float()
    decay = 0.0 if parameter.dim() == 1 else DECAY
    adam = torch.optim.AdamW([parameter], lr=RATE * (STEPS - 1) / 10, betas=BETAS, weight_decay=decay)
    state = {"step": torch.tensor(float(STEPS)), **{key: held[key].clone() for key in ("exp_avg", "exp_avg_sq")}}
    adam.state[parameter].update(state)
    adam.step()
    return {"param": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


@pytest.mark.parametrize(
    "stage, precision, replicas, overrides",
    [
        (1, "fp32", 1, []),
        (1, "bf16", 2, ["model.tie_embeddings=true", "model.qkv_bias=true", "routing.unit=separate"]),
        (2, "fp32", 2, ["routing.router=moe", "routing.unit=mlp"]),
    ],
    ids=["stage-1-fp32", "stage-1-bf16-two-replicas", "stage-2-moe-two-replicas"],
)
def test_engine_goes_on_from_what_the_run_held(trained, tmp_path, stage, precision, replicas, overrides):
    parts = trained(f"train.precision={precision}", *overrides)
    expected, buffers = held_by(parts), dict(parts.chunks[0].named_buffers())
    run = tmp_path / "run"
    to_universal(run, tmp_path / "out")
    spec = {"config": str(run / "config.yaml"), "universal": str(tmp_path / "out"), "found": str(tmp_path / "found.pt")}
    spec["engine"] = engine_configuration(stage, precision, replicas)
    run_ranks(WORKER, replicas, spec, tmp_path / "ranks", timeout_s=120)
    found = torch.load(tmp_path / "found.pt", weights_only=True)

    assert found["state"].keys() == expected.keys() and any(".router." in name for name in expected)
    for name, held in expected.items():
        loaded, after = found["state"][name], found["updated"][name]
        assert all(torch.equal(loaded[key], value) for key, value in held.items()) and held["exp_avg_sq"].any(), name
        assert torch.equal(loaded["weight"], held["param"].to(loaded["weight"].dtype)), name
        for key, value in updated(name, held, loaded["weight"].dtype).items():
            assert torch.allclose(after[key], value, rtol=1e-6, atol=1e-8), f"{key} of {name} after an update"
    assert found["adam_steps"] == [STEPS] * 3
    assert found["counters"] == [STEPS, STEPS * parts.config.train.global_batch, 0]
    assert found["groups"] == [[pytest.approx(0.004), decay, BETAS] for decay in (0.0, DECAY, DECAY)], (
        "the engine's own"
    )
    assert buffers.keys() == found["buffers"].keys()
    assert all(torch.equal(found["buffers"][name], value) for name, value in buffers.items())
    assert "Missing key(s) in state_dict" in found["error"], "without load_universal it must not train on"
    assert found["client"]["run"]["step"] == STEPS and found["client"]["cursor"] == read_cursor(resolve(run))


def test_any_layout_is_exported(start, corpus, tmp_path):
    """Four ranks, tensor 2 x pipeline 2 with sequence parallelism; one process holds what the export says."""
    config = write_config(tmp_path, corpus)
    overrides = [f"run.directory={tmp_path / 'run'}", "routing.unit=separate"]
    overrides += ["model.qkv_bias=true", "model.tie_embeddings=true"]
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    Ranks(config, tmp_path).train(4, {"run": [*overrides, *layout]}, steps=2, save=["run"])
    done = to_universal(tmp_path / "run", tmp_path / "out")
    expected = held_by(start(load_config(config, overrides)))
    zero = tmp_path / "out" / done.tag / "zero"
    assert done.step == 2 and {path.name for path in zero.iterdir()} == {*expected, "optimizer_state.pt"}
    for name, held in expected.items():
        for file, state in STATES.items():
            stored = torch.load(zero / name / f"{file}.pt", weights_only=True)["param"]
            assert torch.equal(stored, held[state]), f"{state} of {name}"
