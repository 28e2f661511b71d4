import io
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megaroute.common.errors import DataError
from megaroute.data.documents import input_files, read_documents
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.tokenizer_training import train_tokenizer

AWKWARD = " \t\n\r\x00\u2581\u2585\u2047\ufb01\uff21\u0301\u200b\ufeff\U0001f600</s><unk><0x41>ab1"
TEXTS = st.text(st.sampled_from(AWKWARD)) | st.text(st.characters(exclude_categories=["Cs"]))
SHARED_TEXT = Path(os.environ.get("MEGAROUTE_SHARED", Path(__file__).parents[4] / "shared")) / "data/corpus"


@pytest.fixture(scope="module")
def unigram_tokenizer(tmp_path_factory, library_documents):
    path = tmp_path_factory.mktemp("unigram") / "tok.model"
    train_tokenizer(library_documents[:8], path, vocab_size=500, model_type="unigram")
    return Tokenizer(path)


def assert_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eod not in ids


@given(TEXTS)
@example("a\u2581 \u2581\u2581b\u2581")
@example("  two\t\ttabs \r\n\n  x\x00  ")
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer, text):
    assert_lossless(tokenizer, text)


@given(TEXTS)
@settings(deadline=None, max_examples=100)
def test_unigram_models_are_lossless_too(unigram_tokenizer, text):
    assert_lossless(unigram_tokenizer, text)


@pytest.mark.parametrize("name", ["tokenizer", "unigram_tokenizer"])
def test_every_character_of_unicode_comes_back(name, request):
    model = request.getfixturevalue(name)
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(characters), 5000):
        text = "".join(characters[first : first + 5000])
        assert model.decode(model.encode(text)) == text


@given(st.lists(TEXTS, max_size=4))
@settings(deadline=None, max_examples=50)
def test_texts_in_a_row_come_back_with_their_ends(tokenizer, texts):
    """Ids of documents, each with its end, can be taken apart again: the end is in no text."""
    ids = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eod)]
    ends = [-1, *(place for place, i in enumerate(ids) if i == tokenizer.eod)]
    assert [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(ends)] == texts


def test_the_space_mark_in_the_text_stays_apart_from_a_space(tokenizer):
    assert tokenizer.encode("a\u2581b") != tokenizer.encode("a b")
    assert tokenizer.encode("a\u2581b") == [*tokenizer.encode("a"), *tokenizer.encode("\u2581"), *tokenizer.encode("b")]


def test_controls_have_no_text_and_no_bytes(tokenizer):
    assert tokenizer.decode([tokenizer.eod]) == ""
    assert tokenizer.token_bytes()[[0, tokenizer.eod]].tolist() == [0, 0]
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes().dtype == "int32"


def test_ids_past_the_vocabulary_have_no_text(tokenizer):
    """A model's embedding may have more rows than the tokenizer has pieces."""
    past = tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("ab"), past]) == "ab"
    assert tokenizer.pieces_text([past]) == [f"<{past}>"]


def test_pieces_text_is_readable(tokenizer):
    ids = tokenizer.encode("def f(x):\n\treturn \u540d")
    shown = tokenizer.pieces_text([*ids, tokenizer.eod])
    assert "".join(shown) == "def f(x):\n\treturn \\xe5\\x90\\x8d</s>"


def test_lone_surrogates_are_refused(tokenizer):
    for text in ("a\ud800b", "\u2581\udfff"):
        with pytest.raises(DataError, match="surrogates"):
            tokenizer.encode(text)


@pytest.mark.parametrize("content", [b"", b"no model at all" * 20, "cut"], ids=["empty", "text", "cut"])
def test_damaged_models_are_refused(tokenizer_path, tmp_path, content):
    path = tmp_path / "tok.model"
    path.write_bytes(tokenizer_path.read_bytes()[:9000] if content == "cut" else content)
    with pytest.raises(DataError, match=r"data\.tokenizer: .*tok\.model is"):
        Tokenizer(path)


def test_a_missing_model_names_the_setting_and_the_file(tmp_path):
    with pytest.raises(DataError, match=r"--tokenizer: .*none\.model cannot be read \(No such file"):
        Tokenizer(tmp_path / "none.model", "--tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text"),
        ({"add_dummy_prefix": True}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"byte_fallback": False}, "0 of the 256 byte pieces"),
        ({"eos_id": -1}, "no </s> piece"),
    ],
    ids=str,
)
def test_models_that_lose_text_are_refused(tmp_path, library_documents, change, message):
    options = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    texts = iter([document.text for document in library_documents[:5]])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=500, model_type="bpe", **{**options, **change}
    )
    path = tmp_path / "lossy.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(DataError, match=message):
        Tokenizer(path)


def test_training_is_deterministic(tmp_path, library_documents):
    for name in ("a", "b"):
        train_tokenizer(library_documents, tmp_path / name, vocab_size=700)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_training_uses_documents_that_are_long_or_have_reserved_characters(tmp_path, library_documents):
    """sentencepiece would drop such a document without a word; then its most common word would be no piece."""
    documents = [
        type(library_documents[0])("x", f"{mark} " + f"zebra{filler} " * 30_000)
        for mark, filler in (("\u2581\u2585", "xyz"), ("", "uvw"))
    ]
    train_tokenizer([*library_documents[:5], *documents], tmp_path / "tok", vocab_size=600)
    tokenizer = Tokenizer(tmp_path / "tok")
    assert len(tokenizer.encode(" zebraxyz")) == len(tokenizer.encode(" zebrauvw")) == 1


def test_indentation_is_one_token(tokenizer):
    assert len(tokenizer.encode("\n        return")) <= 3


@pytest.mark.parametrize("vocab_size", [100, 1_000_000])
def test_a_vocabulary_that_does_not_suit_the_text_is_refused(tmp_path, library_documents, vocab_size):
    with pytest.raises(DataError, match=rf"--vocab-size {vocab_size} does not suit this text \(Vocabulary size"):
        train_tokenizer(library_documents[:5], tmp_path / "tok", vocab_size=vocab_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not SHARED_TEXT.is_dir(), reason="no corpus beside the checkout")
def test_books_and_peps_come_back(tokenizer):
    files = input_files([str(SHARED_TEXT / "*-valid.jsonl.xz")])
    for document in read_documents(files, max_bytes=300_000):
        assert_lossless(tokenizer, document.text)
