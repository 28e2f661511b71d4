"""The tokenizer that a run from imported weights needs: a sentencepiece model with the ids that the weights know."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from megaroute.common.errors import DataError, UserError
from megaroute.data.tokenizer import Tokenizer
from megaroute.export.tokenizer import SENTENCEPIECE_FILE


@dataclass(frozen=True)
class Known:
    """A tokenizer that fits the weights."""

    tokenizer: Tokenizer
    raw: bytes
    """Its file as it goes with the checkpoint."""
    rows: int
    """Of the embedding."""
    given: bool
    """Whether it came from elsewhere than the model."""
    without_prefix: bool
    """Whether the space that it put before a text was switched off."""

    def sentence(self, out: Path) -> str:
        """What there is to know of it."""
        size, mark = self.tokenizer.vocab_size, self.tokenizer.fingerprint[:12]
        found = f"tokenizer: {out / SENTENCEPIECE_FILE}, sha256 {mark}, {size} pieces for {self.rows} rows"
        found += "; runs that start from these weights must use it (make shards with it)"
        if self.without_prefix:
            found += "; the space that it put before every text, which is no text, is switched off"
        if self.given:
            found += "; it was given, so whether its ids are those that the model was trained with is not known"
        return found


def read_tokenizer(folder: Path, given: Path | None, rows: int) -> Known:
    """The tokenizer of a model with `rows` embeddings: `given`, or that of its folder.

    Raises UserError when there is none, it is not lossless, or it has more pieces than the embedding has rows.
    """
    path = given or folder / SENTENCEPIECE_FILE
    if given is None and not path.is_file():
        others = [file.name for file in (folder / "tokenizer.json", folder / "vocab.json") if file.is_file()]
        raise UserError(
            f"{folder} has no {SENTENCEPIECE_FILE}{f' ({others[0]} is of another kind)' if others else ''}, and runs "
            f"read sentencepiece models only: give one of at most {rows} pieces with --tokenizer FILE; unless its ids "
            "are those of the model's own, the embedding must be learned anew"
        )
    key = "--tokenizer" if given else "tokenizer of the model"
    raw, changed = _without_prefix(path.read_bytes() if path.is_file() else b"")
    known = Known(_opened(path, raw, changed, key), raw, rows, given is not None, changed)
    if known.tokenizer.vocab_size > rows:
        raise DataError(
            f"{path} has {known.tokenizer.vocab_size} pieces and the model's embedding (vocab_size) {rows} rows, so it "
            "is not the model's; give the right one with --tokenizer FILE"
        )
    return known


def _opened(path: Path, raw: bytes, changed: bool, key: str) -> Tokenizer:
    if not changed:
        return Tokenizer(path, key)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(raw)
        return Tokenizer(copy, key)


def _without_prefix(raw: bytes) -> tuple[bytes, bool]:
    """The model without `add_dummy_prefix`, and whether it had it: a space that no text has would count as text."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(raw)
    except Exception:  # of protobuf, which has no types; Tokenizer says what the file is
        return raw, False
    if not proto.pieces or not proto.normalizer_spec.add_dummy_prefix:
        return raw, False
    proto.normalizer_spec.add_dummy_prefix = False
    return proto.SerializeToString(), True
