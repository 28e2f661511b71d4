"""A sentencepiece model as a fast tokenizer of transformers, with the same ids for every text."""

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from megaroute.common.errors import DataError
from megaroute.data.tokenizer import PROBE, SPACE_MARK, Tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"
BPE = 2
"""Model type of sentencepiece's trainer."""


def fast_tokenizer(tokenizer: Tokenizer, max_length: int) -> Any:
    """A PreTrainedTokenizerFast that puts the end-of-document token before a text unless asked not to.

    Sentencepiece writes a space as a mark, U+2581, and our tokenizer spells a mark in the text as bytes.  Here pieces
    have plain spaces, so that a mark in the text is a character that no piece has, which is spelled as bytes too.
    Raises DataError when the fast tokenizer gives other ids for text that is hard for tokenizers.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    fast = FastTokenizer(_model(model, tokenizer.path))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    controls = [i for i in range(model.get_piece_size()) if model.is_control(i) or model.is_unknown(i)]
    names = [model.id_to_piece(i) for i in controls]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    eod = model.id_to_piece(tokenizer.eod)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{eod} $A", pair=f"{eod} $A {eod} $B", special_tokens=[(eod, tokenizer.eod)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=eod,
        eos_token=eod,
        pad_token=eod,
        unk_token=model.id_to_piece(model.unk_id()),
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a text that spells a control piece is text
    )
    check_same_ids(tokenizer, wrapped, [PROBE, SPACE_MARK, " ".join(names), "<0x41>"])
    return wrapped


def save_tokenizer(tokenizer: Tokenizer, fast: Any, folder: Path) -> None:
    """Write both into `folder`."""
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # The name that every release of transformers knows.
    named = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named, indent=2) + "\n")
    shutil.copyfile(tokenizer.path, folder / SENTENCEPIECE_FILE)


def check_same_ids(tokenizer: Tokenizer, fast: Any, texts: list[str]) -> None:
    """Raise DataError when the two disagree about a text, with its beginning."""
    for text in texts:
        ours, theirs = tokenizer.encode(text), fast.encode(text, add_special_tokens=False)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise DataError(
                f"data.tokenizer: {tokenizer.path} as a fast tokenizer gives other ids near "
                f"{tokenizer.decode(ours[max(at - 3, 0) : at + 3])!r}, so an exported model would read other text; "
                "train a tokenizer with tools/train_tokenizer.py"
            )


def _model(model: sentencepiece.SentencePieceProcessor, path: Path) -> Any:
    pieces = [model.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(model.get_piece_size())]
    unknown = model.unk_id()
    plain = [i for i in range(len(pieces)) if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    scores = {pieces[i]: float(model.get_score(i)) for i in plain}
    if _model_type(path) != BPE:
        # Control and byte pieces are no text: at this score any other way to read their names is better.
        never = min(scores.values()) * 1000 - 1000
        return models.Unigram(
            [(piece, scores.get(piece, never)) for piece in pieces], unk_id=unknown, byte_fallback=True
        )
    return models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_merges(scores),
        byte_fallback=True,
        unk_token=pieces[unknown],
    )


def _model_type(path: Path) -> int:
    from sentencepiece import sentencepiece_model_pb2  # takes protobuf, and is only needed here

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return int(proto.trainer_spec.model_type)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, in the order in which sentencepiece joins them: the best piece first."""
    order = sorted(scores, key=lambda piece: -scores[piece])
    found = []
    for piece in order:
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        found += [(left, right) for left, right in cuts if left in scores and right in scores]
    return found
