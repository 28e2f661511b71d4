"""One rank of a DeepSpeed engine that loads an export: `python universal_worker.py spec.json out.json`.

The spec has "config" of the run, "universal" (the export), "engine" (DeepSpeed's configuration), and "found": the file
into which rank 0 puts what the engine holds after loading, and after an update by a made-up gradient.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def made_up_gradient(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Three, in another order than the run's: only matrices decay."""
    named = list(model.named_parameters())
    rest = [p for name, p in named if p.dim() > 1 and ".router." not in name]
    routers = [p for name, p in named if ".router." in name]
    norms = [p for _, p in named if p.dim() == 1]
    return [{"params": norms, "weight_decay": 0.0}, {"params": routers}, {"params": rest}]


def state_of(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter: as the model computes with it, the master copy, both moments.  All ranks call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return {
        name: {
            "weight": parameter.detach().clone(),
            "param": safe_get_full_fp32_param(parameter).clone(),
            **{key: safe_get_full_optimizer_state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")},
        }
        for name, parameter in engine.module.named_parameters()
    }


def update(engine: Any) -> None:
    """A step whose gradient is `made_up_gradient`; the model's own forward pass needs a batch and is left out."""
    engine.module.forward = lambda: sum(
        (parameter * made_up_gradient(name, parameter.shape).to(parameter.dtype)).sum()
        for name, parameter in engine.module.named_parameters()
    )
    engine.backward(engine())
    engine.step()


def error_without_load_universal(spec: dict[str, Any], make: Any) -> str:
    """What an engine says that takes the export for a checkpoint of its own kind."""
    engine = make({key: value for key, value in spec["engine"].items() if key != "checkpoint"})
    try:
        engine.load_checkpoint(spec["universal"])
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    import deepspeed
    import torch.distributed as dist
    from layers import model_of

    from megaroute.config.load import load_config
    from megaroute.parallel import groups
    from megaroute.parallel.dims import ParallelDims
    from megaroute.platform import device, distributed

    spec_file, out_file = map(Path, sys.argv[1:])
    spec = json.loads(spec_file.read_text())
    rank, world_size = distributed.start(device.resolve("cpu"), timeout_s=60)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # else compiled for half a minute; gloo is enough
    groups.bring_up(ParallelDims(1, world_size, 1), seed=1)
    config = load_config(Path(spec["config"]), [])

    def make(settings: dict[str, Any]) -> Any:
        model = model_of(config)
        return deepspeed.initialize(model=model, model_parameters=parameter_groups(model), config=settings)[0]

    error = error_without_load_universal(spec, make)
    engine = make(spec["engine"])
    _, client = engine.load_checkpoint(spec["universal"])
    engine.module.load_state_dict(client["buffers"], strict=False)
    engine.lr_scheduler.step(engine.global_steps - 1)
    found = {
        "state": state_of(engine),
        "buffers": {name: value.clone() for name, value in engine.module.named_buffers()},
        "groups": [[group[key] for key in ("lr", "weight_decay", "betas")] for group in engine.optimizer.param_groups],
        "adam_steps": [
            float(engine.optimizer.optimizer.state[group["params"][0]]["step"])
            for group in engine.optimizer.optimizer.param_groups
        ],
        "counters": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "error": error,
        "client": {key: client[key] for key in ("run", "cursor", "universal_checkpoint_info")},
    }
    update(engine)
    found["updated"] = state_of(engine)
    if rank == 0:
        torch.save(found, spec["found"])
    out_file.write_text("{}")
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
