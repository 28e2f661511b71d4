"""Kinds of tokens, by what the text says."""

import numpy as np
import pytest

from megaroute.evaluation.token_types import TYPES, TokenTypes, _type_of


@pytest.mark.parametrize(
    "piece, kind",
    [
        (" the", "word start"),
        ("ing", "continuation"),
        (" 12", "digits"),
        ("7", "digits"),
        ("(", "punctuation"),
        (" ==", "punctuation"),
        ("\n", "white space"),
        ("    ", "white space"),
        ("\\xc3", "byte"),
        (" x2", "word start"),
        ("Über", "continuation"),
    ],
)
def test_kind_of_a_piece(piece, kind):
    assert _type_of(piece) == kind


def test_every_token_of_a_text(scorer):
    tokenizer = scorer.tokenizer
    kinds = TokenTypes(tokenizer, scorer.config.model.vocab_size)
    text = "the (router) reads 12\nß"
    ids = [tokenizer.eod, *tokenizer.encode(text), 310]  # 310 is a row of the embedding without a piece
    names = [list(TYPES)[kind] for kind in kinds.of(ids)]
    pieces = tokenizer.pieces_text(ids)
    assert names[0] == names[-1] == "control"
    by_piece = dict(zip(pieces, names, strict=True))
    assert by_piece["("] == by_piece[")"] == "punctuation"
    assert by_piece["1"] == by_piece["2"] == "digits"
    assert by_piece["\n"] == "white space"
    assert names[-3:-1] == ["byte", "byte"]
    after_bracket = pieces.index("(") + 1  # letters start a word there though no space is in front
    assert names[after_bracket] == "word start"
    words = [name for name in names if name in ("word start", "continuation")]
    assert words.count("word start") == 3, list(zip(pieces, names, strict=True))


def test_kinds_are_numbers_of_the_table(scorer):
    kinds = TokenTypes(scorer.tokenizer, scorer.config.model.vocab_size).of(range(320))
    assert kinds.dtype == np.int8 and kinds.min() >= 0 and kinds.max() < len(TYPES)
