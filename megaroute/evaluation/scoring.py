"""What a trained model says of rows of tokens, on one process or on TP x PP x DP; greedy routing, no dropout.

Shapes: B rows of a batch, S positions, U routed units, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megaroute.checkpoint.layout import read_run
from megaroute.config.root import Config
from megaroute.data.tokenizer import Tokenizer
from megaroute.model.microbatch import MicroBatch, micro_batch
from megaroute.parallel.groups import Groups, model_group
from megaroute.platform import device
from megaroute.routing.context import RoutingContext

PADDED_TO = 16
"""Batches are padded to a multiple of so many positions, so that few shapes occur."""


@dataclass(frozen=True)
class Scored:
    """What the model says of a row of T + 1 tokens: T predictions of the next token."""

    nats: np.ndarray
    """float64 [T], cost of the token that follows each of the first T."""
    likeliest: np.ndarray
    """int64 [T], the token that the model would have chosen."""
    executed: np.ndarray
    """bool [U, T], whether each routed unit executed the token that predicts."""
    starts: np.ndarray
    """int64 [T], where the document of each token starts: it attends to the positions from there on."""


class Scorer:
    """A model of this process's ranks.  All ranks of a replica are asked the same and get the same answers."""

    def __init__(self, config: Config, groups: Groups, model: GPTModel, tokenizer: Tokenizer, checkpoint: Path) -> None:
        self.config, self.groups, self.model, self.tokenizer = config, groups, model, tokenizer
        self.checkpoint, self.step = checkpoint, read_run(checkpoint).step
        self.platform = device.resolve(config.run.device)
        self.context: int = config.data.sequence_length
        """Tokens that a prediction can look back on, the last one included."""

    def score(self, rows: Sequence[Sequence[int]], batch: int) -> list[Scored]:
        """One answer per row of 2 to context + 1 ids, in their order; forward passes take up to `batch` rows.

        A row's answer does not depend on the rows beside it, up to rounding.
        """
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i), reverse=True)
        answers: dict[int, Scored] = {}
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            answers |= zip(chosen, self._forward([rows[i] for i in chosen]), strict=True)
        return [answers[i] for i in range(len(rows))]

    @torch.no_grad()
    def _forward(self, rows: list[Sequence[int]]) -> Iterator[Scored]:
        length = min(-(-max(len(row) - 1 for row in rows) // PADDED_TO) * PADDED_TO, self.context)
        ids = torch.full((len(rows), length + 1), self.tokenizer.eod, dtype=torch.int64)
        for i, row in enumerate(rows):
            assert 2 <= len(row) <= length + 1, f"a row of {len(row)} tokens, context {self.context}"
            ids[i, : len(row)] = torch.tensor(row)
        starts_SB = self._starts(ids[:, :length])
        info = micro_batch(
            length, self._routing(rows), self.platform.upload(starts_SB.numpy()) if self._within else None
        )
        values = self._all_stages(self.platform.upload(ids.numpy()), info).cpu().numpy()
        for i, row in enumerate(rows):
            mine, known = values[:, i, : len(row) - 1], starts_SB[: len(row) - 1, i].numpy()
            yield Scored(mine[0], mine[1].astype(np.int64), mine[2:] > 0, known.astype(np.int64))

    @property
    def _within(self) -> bool:
        return not self.config.data.attend_across_documents

    def _starts(self, ids_BS: Tensor) -> Tensor:
        """int32 [S, B]: an end-of-document token in front belongs to the document before."""
        starts_SB = torch.zeros(ids_BS.T.shape, dtype=torch.int32)
        if self._within:
            starts_SB[1:] = (ids_BS[:, 0] == self.tokenizer.eod).int()
        return starts_SB

    def _routing(self, rows: list[Sequence[int]]) -> RoutingContext:
        # Routers that draw also at inference draw by sample: its number follows from what the row says.
        samples = np.array([_number(row) for row in rows], dtype=np.int64)
        return RoutingContext(seed=self.config.train.seed, step=self.step, samples_B=self.platform.upload(samples))

    def _all_stages(self, ids: Tensor, info: MicroBatch) -> Tensor:
        """float64 [2 + U, B, S] on every rank of the replica: cost, likeliest token, decisions of each unit."""
        tokens_BS, labels_BS = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        batch, length = tokens_BS.shape

        def forward_step(micros: Iterator[MicroBatch], model: torch.nn.Module) -> Any:
            output = model(tokens_BS, None, None, packed_seq_params=next(micros))
            return output, lambda logits_BSv: (logits_BSv.new_zeros(()), {"answer": _answer(logits_BSv, labels_BS)})

        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([info]),
            model=self.model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
        )
        units = self.config.units
        values = torch.zeros(2 + len(units), batch, length, dtype=torch.float64, device=ids.device)
        if self.groups.tensor_rank == 0:  # the others know the same
            if reports:
                values[:2] = reports[0]["answer"]
            for number, unit in enumerate(units):
                if unit.key in info.routing.records:
                    values[2 + number] = info.routing.records[unit.key].keep_SB.T.double()
        dist.all_reduce(values, group=model_group())
        return values


def _answer(logits_BSv: Tensor, labels_BS: Tensor) -> Tensor:
    """float64 [2, B, S]: cost of the label, likeliest id."""
    logits_BSV = gather_from_tensor_model_parallel_region(logits_BSv).float()
    target_BS = logits_BSV.gather(-1, labels_BS[..., None])[..., 0]
    return torch.stack([(logits_BSV.logsumexp(-1) - target_BS).double(), logits_BSV.argmax(-1).double()])


def _number(row: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.array(row, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2
