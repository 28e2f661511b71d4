"""The fast tokenizer of an export gives the ids of the sentencepiece model that the weights were trained with."""

import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megaroute.common.errors import DataError
from megaroute.data.documents import read_documents, stdlib_files
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.tokenizer_training import train_tokenizer
from megaroute.evaluation.logit_gate import TEXT as GATE_TEXT
from megaroute.export.tokenizer import check_same_ids, fast_tokenizer, save_tokenizer

AWKWARD = " \t\n\r\x00\u2581\u2585\u2047\ufb01\uff21\u0301\u200b\ufeff\U0001f600</s><unk><0x41>ab1self"
TEXTS = st.text(st.sampled_from(AWKWARD)) | st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(request, tmp_path_factory):
    """Our tokenizer, and the fast one as a user loads it."""
    folder = tmp_path_factory.mktemp(request.param)
    documents = list(read_documents(stdlib_files(), max_bytes=200_000))
    train_tokenizer(documents, folder / "tok.model", vocab_size=700, model_type=request.param)
    ours = Tokenizer(folder / "tok.model")
    save_tokenizer(ours, fast_tokenizer(ours, max_length=10**9), folder / "saved")
    return ours, AutoTokenizer.from_pretrained(folder / "saved")


@given(text=TEXTS)
@example(text="a\u2581 \u2581\u2581b\u2581")
@example(text="  two\t\ttabs \r\n\n  x\x00  </s> <unk>")
@settings(deadline=None, max_examples=300)
def test_any_text_has_the_same_ids_and_comes_back(pair, text):
    ours, fast = pair
    ids = fast.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text)
    assert fast.decode(ids) == text


def test_every_character_of_unicode_has_the_same_ids(pair):
    ours, fast = pair
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    texts = ["".join(characters[first : first + 50_000]) for first in range(0, len(characters), 50_000)]
    check_same_ids(ours, fast, texts)


def test_real_text_has_the_same_ids(pair):
    text = "".join(document.text for document in read_documents(stdlib_files(), max_bytes=300_000))
    assert len(text) > 200_000
    check_same_ids(*pair, [GATE_TEXT.read_text(), text])


def test_text_starts_like_a_document_unless_asked_not_to(pair):
    ours, fast = pair
    assert fast("a b")["input_ids"] == [ours.eod, *ours.encode("a b")]
    assert fast.eos_token_id == fast.pad_token_id == ours.eod
    padded = fast(["a b c d e", "a"], padding=True)
    assert padded["attention_mask"][1][0] == 0 and padded["attention_mask"][1][-1] == 1


def test_other_ids_are_noticed(pair, tmp_path):
    ours, _ = pair
    train_tokenizer(read_documents(stdlib_files(), max_bytes=50_000), tmp_path / "other.model", vocab_size=400)
    with pytest.raises(DataError, match="^data.tokenizer: .* gives other ids near '"):
        check_same_ids(ours, fast_tokenizer(Tokenizer(tmp_path / "other.model"), 128), ["import the module"])
