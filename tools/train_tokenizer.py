"""Train a lossless sentencepiece tokenizer on text files or on the Python standard library."""

import argparse
import sys
from pathlib import Path

from megaroute.common.errors import DataError, UserError
from megaroute.data.corpus_arguments import add_corpus_arguments, corpus_documents
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.tokenizer_training import train_tokenizer


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_corpus_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, 256 of them bytes")
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    arguments = parse_arguments(argv)
    out = arguments.out
    try:
        if out.exists() and not arguments.overwrite:
            raise DataError(f"{out} exists and would be replaced; choose another file or add --overwrite")
        if not out.absolute().parent.is_dir():
            raise DataError(f"{out} cannot be written, since its folder does not exist; make the folder first")
        documents = corpus_documents(arguments)
        train_tokenizer(documents, out, vocab_size=arguments.vocab_size, model_type=arguments.model_type)
        tokenizer = Tokenizer(out, "--out")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{out}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.fingerprint[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
