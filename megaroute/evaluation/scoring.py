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
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

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


@dataclass(frozen=True)
class _Asked:
    """A micro-batch."""

    tokens_BS: Tensor
    labels_BS: Tensor
    info: MicroBatch


class Scorer:
    """A model of this process's ranks.  All ranks of a replica are asked the same and get the same answers."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        chunks: Sequence[torch.nn.Module],
        tokenizer: Tokenizer,
        step: int,
        checkpoint: Path | None = None,
    ) -> None:
        """`chunks`: the models of this rank's stage, in eval mode; `step`: optimizer steps that they have had."""
        self.config, self.groups, self.chunks, self.tokenizer = config, groups, list(chunks), tokenizer
        self.step, self.checkpoint = step, checkpoint
        self.platform = device.resolve(config.run.device)
        self.context: int = config.data.sequence_length
        """Tokens that a prediction can look back on, the last one included."""
        # Replicas that exchange rows have to make the same passes: each is then asked everything.
        apart = config.routing.dispatch.exchange == "none"
        self.replica, self.replicas = (groups.data_rank, groups.dims.data) if apart else (0, 1)
        """Which share of the questions is this rank's, and of how many."""

    def of_all_replicas(self, mine: Any) -> list[Any]:
        """What each replica has to say, on all of them."""
        if self.replicas == 1:
            return [mine]
        parts: list[Any] = [None] * self.replicas
        dist.all_gather_object(parts, mine, group=self.groups.data_group)
        return parts

    def score(self, rows: Sequence[Sequence[int]], batch: int) -> list[Scored]:
        """One answer per row of 2 to context + 1 ids, in their order.

        Forward passes take up to `batch` rows of the whole context, of shorter ones as many more as are no more tokens.
        A row's answer does not depend on the rows beside it, up to rounding.
        """
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i), reverse=True)
        answers: dict[int, Scored] = {}
        while order:
            fitting = batch * self.context // self._padded(len(rows[order[0]]) - 1)
            chosen, order = order[:fitting], order[fitting:]
            answers |= zip(chosen, self._forward([rows[i] for i in chosen]), strict=True)
        return [answers[i] for i in range(len(rows))]

    def _padded(self, tokens: int) -> int:
        return min(-(-tokens // PADDED_TO) * PADDED_TO, self.context)

    @torch.no_grad()
    def _forward(self, rows: list[Sequence[int]]) -> Iterator[Scored]:
        length = self._padded(max(len(row) - 1 for row in rows))
        # The interleaved schedule wants a multiple of the stages in micro-batches of one size.
        parts = self.groups.dims.pipeline if len(self.chunks) > 1 else 1
        size = -(-len(rows) // parts)
        padded = [*rows, *[rows[-1]] * (parts * size - len(rows))]
        ids = torch.full((len(padded), length + 1), self.tokenizer.eod, dtype=torch.int64)
        for i, row in enumerate(padded):
            assert 2 <= len(row) <= length + 1, f"a row of {len(row)} tokens, context {self.context}"
            ids[i, : len(row)] = torch.tensor(row)
        starts_SB = self._starts(ids[:, :length])
        asked = [
            self._ask(padded[first : first + size], ids[first : first + size], starts_SB[:, first : first + size])
            for first in range(0, len(padded), size)
        ]
        values = self._all_stages(asked).cpu().numpy()
        for i, row in enumerate(rows):
            mine, known = values[:, i, : len(row) - 1], starts_SB[: len(row) - 1, i].numpy()
            yield Scored(mine[0], mine[1].astype(np.int64), mine[2:] > 0, known.astype(np.int64))

    def _ask(self, rows: list[Sequence[int]], ids: Tensor, starts_SB: Tensor) -> _Asked:
        starts = self.platform.upload(starts_SB.numpy().copy()) if self._within else None
        info = micro_batch(ids.shape[1] - 1, self._routing(rows), starts)
        sent = self.platform.upload(ids.numpy())
        return _Asked(sent[:, :-1].contiguous(), sent[:, 1:].contiguous(), info)

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

    def _all_stages(self, asked: list[_Asked]) -> Tensor:
        """float64 [2 + U, B, S] on every rank of the replica: cost, likeliest token, decisions of each unit."""
        batch, length = asked[0].tokens_BS.shape
        chunks = len(self.chunks)
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(asked) if chunks == 1 else [iter(asked) for _ in range(chunks)],
            model=self.chunks[0] if chunks == 1 else self.chunks,
            num_microbatches=len(asked),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
        )
        values = torch.cat([self._known(part, i, reports) for i, part in enumerate(asked)], 1)
        dist.all_reduce(values, group=model_group())
        return values

    def _known(self, part: _Asked, number: int, reports: list[dict[str, Tensor]]) -> Tensor:
        """What this rank knows of the answers, else 0; tensor ranks know the same, so the first speaks."""
        units = self.config.units
        values = torch.zeros(2 + len(units), *part.tokens_BS.shape, dtype=torch.float64, device=part.tokens_BS.device)
        if self.groups.tensor_rank == 0:
            if reports:
                values[:2] = reports[number]["answer"]
            for place, unit in enumerate(units, 2):
                if unit.key in part.info.routing.records:
                    values[place] = part.info.routing.records[unit.key].keep_SB.T.double()
        return values


def _forward_step(asked: Iterator[_Asked], model: torch.nn.Module) -> tuple[Tensor, Any]:
    part = next(asked)
    output = model(part.tokens_BS, None, None, packed_seq_params=part.info)
    return output, lambda logits_BSv: (logits_BSv.new_zeros(()), {"answer": _answer(logits_BSv, part.labels_BS)})


def _answer(logits_BSv: Tensor, labels_BS: Tensor) -> Tensor:
    """float64 [2, B, S]: cost of the label, likeliest id."""
    logits_BSV = gather_from_tensor_model_parallel_region(logits_BSv).float()
    target_BS = logits_BSV.gather(-1, labels_BS[..., None])[..., 0]
    return torch.stack([(logits_BSV.logsumexp(-1) - target_BS).double(), logits_BSV.argmax(-1).double()])


def _number(row: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.array(row, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2
