"""A sentencepiece model that gives any text back exactly, with the bytes of text that each token stands for."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from megaroute.common.errors import DataError

SPACE_MARK = "\u2581"  # what sentencepiece writes for a space inside its pieces
SPACE_MARK_BYTES = SPACE_MARK.encode()

# A model that normalises fails on it: ligature, full-width letter, decomposed accent, white space at ends and in runs.
PROBE = " \t two  spaces\r\n\n\ufb01 \uff21 e\u0301 \x00 \U0001f600 "


class Tokenizer:
    """Text to token ids and back, without loss.

    Raises DataError when `path` is not a lossless sentencepiece model with an end-of-document piece; `key` is the
    setting that named the file.
    """

    def __init__(self, path: str | Path, key: str = "data.tokenizer") -> None:
        self.path = Path(path)
        raw = self._read(key)
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        """Hexadecimal sha256 of the model file."""
        self._model = self._load(raw, key)
        self.vocab_size: int = self._model.get_piece_size()
        """Number of pieces, control pieces included."""
        self.eod: int = self._model.eos_id()
        """Id of the piece that ends a document."""
        self._check(key)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document token.  Raises DataError for lone surrogates, which are no text."""
        try:
            if SPACE_MARK not in text:
                return self._model.encode(text)
            first, *rest = [self._model.encode(part) for part in text.split(SPACE_MARK)]
        except RuntimeError as error:
            raise DataError(
                f"text with lone surrogates cannot be tokenised ({error}); write it as valid UTF-8"
            ) from error
        # As text the mark would come back as a space; as bytes it comes back as itself.
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK_BYTES]
        return first + [i for part in rest for i in (*mark, *part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`.  Control pieces and ids past the vocabulary have none; broken UTF-8 gives U+FFFD."""
        return self._model.decode([i for i in map(int, ids) if i < self.vocab_size])

    def pieces_text(self, ids: Iterable[int]) -> list[str]:
        """Readable text of each id alone: its characters, `\\xNN` for a byte that is no character, a control's name."""
        return [self._piece_text(int(i)) for i in ids]

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 [vocab_size]; they add up to the length of the text."""
        return np.array([self._piece_bytes(i) for i in range(self.vocab_size)], dtype=np.int32)

    def _piece_text(self, i: int) -> str:
        if i >= self.vocab_size:
            return f"<{i}>"
        piece = self._model.id_to_piece(i)
        if not self._model.is_byte(i):
            return piece.replace(SPACE_MARK, " ")
        byte = int(piece[1:-1], 16)
        return chr(byte) if byte < 128 else f"\\x{byte:02x}"

    def _piece_bytes(self, i: int) -> int:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return 0
        return 1 if self._model.is_byte(i) else len(self._model.id_to_piece(i).replace(SPACE_MARK, " ").encode())

    def _read(self, key: str) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{key}: {self.path} cannot be read ({error.strerror}), so no text can be tokenised; "
                f"train a tokenizer with tools/train_tokenizer.py or give the right path"
            ) from error

    def _load(self, raw: bytes, key: str) -> sentencepiece.SentencePieceProcessor:
        remedy = "copy it again, or train one with tools/train_tokenizer.py"
        if not raw:
            raise DataError(f"{key}: {self.path} is empty, not a sentencepiece model; {remedy}")
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=raw)
        except RuntimeError as error:
            raise DataError(f"{key}: {self.path} is not a sentencepiece model, or a damaged one; {remedy}") from error

    def _check(self, key: str) -> None:
        remedy = "train one with tools/train_tokenizer.py"
        if self.eod < 0:
            raise DataError(f"{key}: {self.path} has no </s> piece, which must end each document; {remedy}")
        bytes_known = sum(self._model.is_byte(i) for i in range(self.vocab_size))
        if bytes_known != 256:
            raise DataError(
                f"{key}: {self.path} has {bytes_known} of the 256 byte pieces, so some text would be lost; {remedy}"
            )
        ids = self.encode(PROBE)
        if self.decode(ids) != PROBE or sum(map(self._piece_bytes, ids)) != len(PROBE.encode()):
            raise DataError(
                f"{key}: {self.path} changes text (Unicode normalisation or white space), so bits per byte "
                f"and generated text would be wrong; {remedy}"
            )
