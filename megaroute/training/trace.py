"""Which tokens executed which layers: a few validation rows, for the report."""

import math
from typing import Any

import torch
import torch.distributed as dist

from megaroute.data.tokenizer import Tokenizer
from megaroute.training.evaluate import score
from megaroute.training.parts import Parts

FILE_NAME = "routing_trace.json"
FORMAT = 1


@torch.no_grad()
def trace(parts: Parts, rows: int) -> dict[str, Any] | None:
    """The decisions for the first `rows` validation rows of replica 0, collected from all stages.

    Returns on rank 0 what metrics/report.py shows, as JSON can hold it; elsewhere None.
    """
    size, stages = parts.config.train.micro_batch, parts.groups.dims.pipeline
    # The interleaved schedule wants micro-batches in multiples of the stages.
    scored = math.ceil(rows / (size * stages)) * size * stages
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, _of_this_rank(parts, scored))
    return _assembled(parts, gathered, rows) if dist.get_rank() == 0 else None


def _of_this_rank(parts: Parts, rows: int) -> dict[str, Any]:
    groups = parts.groups
    micros, reports = score(parts, rows)
    if groups.data_rank or groups.tensor_rank:
        return {}
    mine: dict[str, Any] = {"keep": {}}
    for unit in parts.routers:
        keep = [micro.info.routing.records[unit.key].keep_SB.T for micro in micros]
        mine["keep"][unit.key] = torch.cat(keep).int().tolist()
    if groups.is_last_stage:
        mine["loss"] = torch.cat([report["losses"].float() for report in reports]).tolist()
    if groups.is_first_stage:
        mine["ids"] = torch.cat([micro.tokens_BS for micro in micros if micro.tokens_BS is not None]).tolist()
        mine["tokens"] = [count for micro in micros for count in micro.row_tokens]
    return mine


def _assembled(parts: Parts, gathered: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    config = parts.config
    keep = {unit: values for part in gathered for unit, values in part.get("keep", {}).items()}
    (ids,) = [part["ids"] for part in gathered if "ids" in part]
    (losses,) = [part["loss"] for part in gathered if "loss" in part]
    (tokens,) = [part["tokens"] for part in gathered if "tokens" in part]
    tokenizer = Tokenizer(config.data.tokenizer)
    return {
        "format": FORMAT,
        "step": parts.state.step,
        "num_layers": config.model.num_layers,
        "units": [unit.label for unit in config.units],
        "density_target": config.routing.density,
        "passages": [
            {
                "tokens": tokenizer.pieces_text(ids[row][:count]),
                "keep": [keep[unit.key][row][:count] for unit in config.units],
                "loss": losses[row][:count],
            }
            for row, count in enumerate(tokens[:rows])
        ],
    }
