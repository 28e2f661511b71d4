"""Training of a lossless sentencepiece model."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from megaroute.common.errors import DataError
from megaroute.common.files import atomic_write
from megaroute.data.documents import Document
from megaroute.data.tokenizer import SPACE_MARK

UNKNOWN_MARK = "\u2585"  # sentencepiece drops a whole document that has it
ERRORS_ONLY = 2


def train_tokenizer(
    documents: Iterable[Document], out: Path, *, vocab_size: int, model_type: Literal["bpe", "unigram"] = "bpe"
) -> None:
    """Train on all `documents` (they are held in memory) and write the model to `out`, whole or not at all.

    Any text survives a round trip: no normalisation, white space kept, unknown characters as bytes.  The only control
    pieces are <unk> (id 0, never produced) and </s> (id 1, end of document).  The same documents give the same file.
    Raises DataError when the text is too little or `vocab_size` does not suit it.
    """
    texts = [document.text.replace(SPACE_MARK, " ").replace(UNKNOWN_MARK, " ") for document in documents]
    if not texts:
        raise DataError("there is no document to train a tokenizer on; give more text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type=model_type, **_OPTIONS
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].rstrip(".")
        raise DataError(
            f"--vocab-size {vocab_size} does not suit this text ({reason}); change it or the text"
        ) from error
    try:
        atomic_write(out, model.getvalue())
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror}); choose another --out") from error


_OPTIONS: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # indentation of source code in one token
    "split_digits": True,
    "character_coverage": 0.9998,
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
    "max_sentence_length": 2**30,  # bytes; longer documents would be dropped in silence
    "num_threads": 1,  # with more, two runs give different models
    "minloglevel": ERRORS_ONLY,
}
