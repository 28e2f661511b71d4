"""A corpus for benchmarks from what is on every machine: the Python files of the standard library."""

from pathlib import Path

from megaroute.data.build import build_shards
from megaroute.data.documents import read_documents, stdlib_files
from megaroute.data.shard_writer import Tokenize
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.tokenizer_training import train_tokenizer


def make_corpus(folder: Path, vocab_size: int, max_bytes: int | None = None, tokenize: Tokenize = "no") -> None:
    """Write tokenizer.model and the shard folders train and valid below `folder`, unless they are there already.

    Args:
        vocab_size: pieces of the tokenizer, 256 of them bytes.
        max_bytes: about so much text, from all files; everything when None.
        tokenize: whether token ids are stored too.
    """
    if (folder / "valid" / "manifest.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    documents = list(read_documents(stdlib_files(), max_bytes=max_bytes))
    train_tokenizer(documents, folder / "tokenizer.model", vocab_size=vocab_size)
    build_shards(
        documents,
        folder / "train",
        shard_bytes=4 * 2**20,
        tokenizer=Tokenizer(folder / "tokenizer.model"),
        tokenize=tokenize,
        valid_out=folder / "valid",
        valid_fraction=0.05,
    )
