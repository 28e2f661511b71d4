"""What kind of text a token is."""

from collections.abc import Sequence

import numpy as np

from megaroute.data.tokenizer import Tokenizer

TYPES = {
    "word start": "letters, with the space before them or at the start of a word",
    "continuation": "letters that go on with a word",
    "digits": "digits, with the space before them",
    "punctuation": "neither letters, digits nor white space",
    "white space": "spaces, tabs and line ends alone",
    "byte": "one byte of a character that has no piece",
    "control": "the end of a document, and pieces without text",
}
"""Each kind with what belongs to it; a token is of the first kind from the bottom that it fits."""
_NAMES = tuple(TYPES)
_START, _GOES_ON = _NAMES.index("word start"), _NAMES.index("continuation")


class TokenTypes:
    """Kinds of all tokens of a tokenizer, by their number in TYPES."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ids = range(vocab_size)
        has_text = np.zeros(vocab_size, dtype=bool)
        has_text[: tokenizer.vocab_size] = tokenizer.token_bytes() > 0
        texts = tokenizer.pieces_text(ids)
        known = [_type_of(text) if known else "control" for text, known in zip(texts, has_text, strict=True)]
        self._types = np.array([_NAMES.index(name) for name in known], dtype=np.int8)
        self._ends_in_word = np.array(
            [bool(known and text[-1:].isalnum()) for text, known in zip(texts, has_text, strict=True)]
        )
        # A byte shown as an escape is a piece of a letter more often than not, and never the end of a word known here.
        self._ends_in_word &= self._types != _NAMES.index("byte")

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """int8 [T], the kind of each token of a text; letters after a letter or digit go on with a word."""
        row = np.asarray(ids)
        types = self._types[row].copy()
        after = np.zeros(len(row), dtype=bool)
        after[1:] = self._ends_in_word[row[:-1]]
        types[(types == _GOES_ON) & ~after] = _START
        return types


def _type_of(text: str) -> str:
    """The kind of a piece alone; letters without a space in front count as continuation."""
    if len(text) == 4 and text.startswith("\\x"):
        return "byte"
    if text.isspace():
        return "white space"
    inner = text.strip()
    if inner.isdigit():
        return "digits"
    if not any(character.isalnum() for character in inner):
        return "punctuation"
    return "word start" if text[0].isspace() else "continuation"
