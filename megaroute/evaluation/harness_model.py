"""A training checkpoint as a model of lm-evaluation-harness, on any layout.

The harness sees one process: every rank is asked everything, replicas share the rows out among themselves, and all
ranks hold all answers.  So nothing of the harness, the choice of examples least of all, depends on the number of ranks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from lm_eval.api.model import TemplateLM

from megaroute.common.errors import DataError
from megaroute.common.progress import Progress
from megaroute.config.units import executed_layers
from megaroute.evaluation.scoring import Scored, Scorer
from megaroute.evaluation.windows import windows

AT_ONCE = 1024
"""Rows scored together; of all else only sums are kept."""
MAX_TOKENS = 256
"""Tokens that an answer has at most, unless its task says otherwise."""

Likelihood = tuple[float, bool]
"""Logarithm of the probability, and whether greedy decoding would give the same."""


class HarnessModel(TemplateLM):
    """Scores and continues texts, each of which starts like a document, after an end-of-document token."""

    def __init__(self, scorer: Scorer, batch: int) -> None:
        super().__init__()
        self.scorer, self.batch = scorer, batch
        self._device = scorer.platform.device
        self._executed = np.zeros(1 + len(scorer.config.units))
        self.task = ""
        """What is being asked, where progress is to be told."""

    @property
    def eot_token_id(self) -> int:
        """What an empty context is."""
        return self.scorer.tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's caches."""
        return self.scorer.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text from the start of a document, after its token, unless `add_special_tokens` is False."""
        ids = self.scorer.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def layers_executed(self) -> float | None:
        """Mean layers of all predictions since the last call, on all replicas; None if there were none."""
        parts = self.scorer.of_all_replicas(self._executed)
        self._executed = np.zeros_like(self._executed)
        tokens, *kept = np.sum(parts, axis=0)
        config = self.scorer.config
        return executed_layers(config.model.num_layers, config.units, [k / tokens for k in kept]) if tokens else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Likelihood]:
        rows = [[*context, *wanted] for _, context, wanted in requests]
        return self._likelihoods(rows, [len(wanted) for _, _, wanted in requests])

    def _likelihoods(self, rows: Sequence[list[int]], counted: Sequence[int]) -> list[Likelihood]:
        """Of the last `counted` tokens of each row; a row that is too long loses its beginning."""
        size = self.scorer.context + 1
        mine: dict[int, Likelihood] = {}
        chunks = self._chunks([len(row) for row in rows])
        with self._progress(chunks) as progress:
            for chunk in chunks:
                answers = self.scorer.score([rows[i][-size:] for i in chunk], self.batch)
                for i, answer in zip(chunk, answers, strict=True):
                    mine[i] = self._likelihood(rows[i][-size:], counted[i], answer)
                progress.add(len(chunk))
        return self._of_all_replicas(mine)

    def _likelihood(self, row: list[int], counted: int, answer: Scored) -> Likelihood:
        last = slice(len(answer.nats) - min(counted, len(answer.nats)), None)
        self._note(answer.executed[:, last])
        greedy = (answer.likeliest[last] == row[1:][last]).all()
        return -float(answer.nats[last].sum()), bool(greedy)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Logarithm of the probability of each whole text, in windows of the whole context, each token once."""
        rows, counted, owner = [], [], []
        for number, request in enumerate(requests):
            for window in windows(self.tok_encode(request.args[0]), self.scorer.context, self.scorer.context):
                rows.append(window.ids)
                counted.append(window.scored)
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._likelihoods(rows, counted), strict=True):
            sums[number] += value
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The likeliest continuation of each context up to a stop text, the end of a document, or the most tokens.

        Every token is a pass over its whole context.  Raises DataError for a task that asks for sampling.
        """
        for request in requests:
            if request.args[1].get("do_sample") or request.args[1].get("temperature"):
                raise DataError(
                    f"a task asks for sampling ({request.args[1]}), so its result would change from run to run; set "
                    "do_sample: false and temperature: 0 in its file"
                )
        mine: dict[int, str] = {}
        chunks = self._chunks([len(request.args[0]) for request in requests])
        with self._progress(chunks) as progress:
            for chunk in chunks:
                mine |= zip(chunk, self._continue([requests[i].args for i in chunk], progress), strict=True)
        return self._of_all_replicas(mine)

    def _continue(self, asked: list[tuple[str, dict[str, Any]]], progress: Progress) -> list[str]:
        tokenizer = self.scorer.tokenizer
        contexts = [[tokenizer.eod, *tokenizer.encode(context)][-self._room(settings) :] for context, settings in asked]
        found: list[list[int]] = [[] for _ in asked]
        texts: list[str | None] = [None] * len(asked)
        while open_ := [i for i, text in enumerate(texts) if text is None]:
            rows = [[*(contexts[i] + found[i])[-self.scorer.context :], tokenizer.eod] for i in open_]
            for i, answer in zip(open_, self.scorer.score(rows, self.batch), strict=True):
                self._note(answer.executed[:, -1:])
                chosen = int(answer.likeliest[-1])
                if chosen != tokenizer.eod:
                    found[i].append(chosen)
                texts[i] = _finished(tokenizer.decode(found[i]), chosen == tokenizer.eod, len(found[i]), asked[i][1])
            progress.add(len(open_) - texts.count(None))
        return [text or "" for text in texts]

    def _room(self, settings: dict[str, Any]) -> int:
        """Tokens of a context, so that an answer of most tokens fits behind it; at least half of what there is."""
        size = self.scorer.context
        return max(size - int(settings.get("max_gen_toks", MAX_TOKENS)), size // 2, 1)

    def _note(self, executed: np.ndarray) -> None:
        self._executed += [executed.shape[1], *executed.sum(1)]

    def _chunks(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of this replica's rows, the longest first so that what is together is of one length."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        mine = order[self.scorer.replica :: self.scorer.replicas]
        return [mine[first : first + AT_ONCE] for first in range(0, len(mine), AT_ONCE)]

    def _progress(self, chunks: list[list[int]]) -> Progress:
        shown = bool(self.task) and dist.get_rank() == 0
        return Progress(self.task, "question", sum(map(len, chunks)), shown)

    def _of_all_replicas(self, mine: dict[int, Any]) -> list[Any]:
        found = {i: value for part in self.scorer.of_all_replicas(mine) for i, value in part.items()}
        return [found[i] for i in range(len(found))]


def _finished(text: str, ended: bool, tokens: int, settings: dict[str, Any]) -> str | None:
    """The answer, cut at the first stop text; None while it goes on."""
    stops = settings.get("until") or []
    places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
    if places:
        return text[: min(places)]
    return text if ended or tokens >= settings.get("max_gen_toks", MAX_TOKENS) else None
