"""The bits per byte of a model that knows only how often each token occurs: what a trained model must beat."""

import math
from collections.abc import Iterator

import numpy as np

from megaroute.config.data import DataConfig
from megaroute.data.stream import Stream, open_stream
from megaroute.data.tokenizer import Tokenizer

CHUNK = 64  # rows in memory at a time


def unigram_bits_per_byte(data: DataConfig, vocab_size: int, train_rows: int, valid_rows: int) -> float:
    """Bits per byte of the first `valid_rows` validation rows under token frequencies of the first `train_rows` rows.

    With c_v occurrences of token v among the N training tokens and V = vocab_size, add-one smoothing (Laplace) gives
    p(v) = (c_v + 1) / (N + V).  The result is sum over targets of -log2 p(target), divided by the sum of their UTF-8
    bytes.  Targets are ids[:, 1:]; end-of-document costs bits and has no bytes, as in the model's own validation.

    Raises DataError when the data cannot be read or there is no validation folder.
    """
    train = np.zeros(vocab_size, np.int64)
    for ids in _chunks(open_stream(data, "train"), train_rows):
        train += np.bincount(ids.ravel(), minlength=vocab_size)
    targets = np.zeros(vocab_size, np.int64)
    for ids in _chunks(open_stream(data, "valid"), valid_rows):
        targets += np.bincount(ids[:, 1:].ravel(), minlength=vocab_size)
    nll = np.log(train.sum() + vocab_size) - np.log(train + 1)
    token_bytes = Tokenizer(data.tokenizer).token_bytes()
    return float(targets @ nll / (math.log(2) * (targets[: len(token_bytes)] @ token_bytes)))


def _chunks(stream: Stream, rows: int) -> Iterator[np.ndarray]:
    with stream:
        for first in range(0, rows, CHUNK):
            yield stream.take(min(CHUNK, rows - first)).ids
