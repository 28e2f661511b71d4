"""Sources of invented texts without files and tokenizer: a token is a letter."""

import numpy as np

from megaroute.common.errors import DamagedShard
from megaroute.data.order import Order, cut_slices

EOD = 0


def encode_letters(text: str) -> list[int]:
    return [*map(ord, text), EOD]


def make_texts(documents: list[int]) -> list[list[str]]:
    """Distinct texts of 0 to 24 letters, one list a shard."""
    return [
        [chr(200 + shard) + chr(300 + i) * (i * 7 % 25) for i in range(count)] for shard, count in enumerate(documents)
    ]


class Texts:
    """A source whose documents are letters; those in `damaged`, pairs of (shard, document), cannot be read."""

    def __init__(self, texts: list[list[str]], lanes: int, name: str = "train", weight: float = 1.0) -> None:
        self.name, self.weight, self.texts = name, weight, texts
        self.order = Order(cut_slices([len(shard) for shard in texts], 4 * lanes), 5, name)
        self.damaged: set[tuple[int, int]] = set()

    def ids(self, shard: int, document: int) -> np.ndarray:
        if (shard, document) in self.damaged:
            raise DamagedShard(f"document {document} of shard {shard} is damaged")
        return np.array(encode_letters(self.texts[shard][document]), np.int32)
