"""One rank of an exchange test: `python exchange_worker.py spec.json out.json`.

The spec lists cases, each {"counts": rows of every rank for each MLP of a stack, "dtype", "recompute"}.  The output
has, for each case, the largest errors against the same MLPs without exchange, and the rows computed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaroute.platform import device, distributed
from megaroute.routing.exchange import balanced

HIDDEN, INNER = 12, 20


class Stack:
    """MLPs with a residual around each, on growing or shrinking numbers of rows, as units of a model have them."""

    def __init__(self, case: dict[str, Any], rank: int) -> None:
        dtype = getattr(torch, case["dtype"])
        torch.manual_seed(5)  # equal weights on all ranks
        self.counts = [counts[rank] for counts in case["counts"]]
        self.mlps = [self._mlp().to(dtype) for _ in self.counts]
        self.rows_computed: list[int] = []
        self.recompute = case["recompute"]
        torch.manual_seed(100 + rank)  # other rows on each
        self.x_TH = torch.randn(max(self.counts), HIDDEN).to(dtype).requires_grad_()

    @staticmethod
    def _mlp() -> nn.Module:
        return nn.Sequential(
            nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, INNER, bias=False), nn.GELU(), nn.Linear(INNER, HIDDEN)
        )

    def run(self, exchange: bool) -> dict[str, Tensor]:
        """Output and gradients; those of weights summed over the ranks, as data parallelism does."""
        weights = [weight for mlp in self.mlps for weight in mlp.parameters()]
        for tensor in (self.x_TH, *weights):
            tensor.grad = None
        y_TH = self.x_TH
        for count, mlp in zip(self.counts, self.mlps, strict=True):
            y_TH = y_TH.index_add(0, torch.arange(count), self._one(y_TH[:count], mlp, exchange))
        (y_TH * torch.linspace(-1, 1, y_TH.numel()).view_as(y_TH)).sum().backward()
        found = {"output": y_TH.detach(), "input": self.x_TH.grad}
        for index, weight in enumerate(weights):
            dist.all_reduce(weight.grad)
            found[f"weight {index}"] = weight.grad
        return {name: value.clone() for name, value in found.items()}

    def _one(self, rows_KH: Tensor, mlp: nn.Module, exchange: bool) -> Tensor:
        def compute(rows_CH: Tensor) -> Tensor:
            if exchange:
                self.rows_computed.append(rows_CH.shape[0])
            return mlp(rows_CH)

        def spread(rows_KH: Tensor) -> Tensor:
            out_KH, rows = balanced(rows_KH, compute, dist.group.WORLD)
            assert rows == self.rows_computed[-1]
            return out_KH

        function = spread if exchange else compute
        return checkpoint(function, rows_KH, use_reentrant=True) if self.recompute else function(rows_KH)


def check(case: dict[str, Any], rank: int) -> dict[str, Any]:
    stack = Stack(case, rank)
    expected, got = stack.run(exchange=False), stack.run(exchange=True)
    errors = {
        name: float((got[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1))
        for name in expected
        if expected[name].numel()
    }
    return {"errors": errors, "rows_computed": stack.rows_computed}


def main() -> None:
    spec_file, out_file = map(Path, sys.argv[1:])
    distributed.start(device.resolve("cpu"), timeout_s=120)
    spec = json.loads(spec_file.read_text())
    out_file.write_text(json.dumps([check(case, dist.get_rank()) for case in spec["cases"]]))
    distributed.stop()


if __name__ == "__main__":
    main()
