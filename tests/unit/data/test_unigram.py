import math
from collections import Counter

import pytest

from megaroute.common.errors import DataError
from megaroute.data.stream import open_stream
from megaroute.data.unigram import unigram_bits_per_byte


def test_equals_the_sum_written_out(data, tokenizer):
    train = Counter(open_stream(data, "train").take(70).ids.ravel().tolist())
    targets = open_stream(data, "valid").take(20).ids[:, 1:].ravel().tolist()
    total = sum(train.values()) + 1024
    bits = sum(-math.log2((train[i] + 1) / total) for i in targets)
    size = sum(int(tokenizer.token_bytes()[i]) for i in targets)
    assert tokenizer.eod in targets
    assert unigram_bits_per_byte(data, 1024, train_rows=70, valid_rows=20) == pytest.approx(bits / size, rel=1e-12)


def test_more_training_text_helps(data):
    little, much = (unigram_bits_per_byte(data, 1000, rows, 20) for rows in (1, 150))
    assert 0.5 < much < little


def test_validation_text_is_needed(data):
    with pytest.raises(DataError, match=r"data\.valid"):
        unigram_bits_per_byte(data.model_copy(update={"valid": None}), 1000, 1, 1)
