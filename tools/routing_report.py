"""Which tokens a trained model spends its layers on: one HTML page and CSV files about text files."""

import argparse
import sys
import warnings
from pathlib import Path

if not sys.warnoptions:  # Megatron-core tells its own developers, while imported, what it does without
    warnings.simplefilter("ignore")

from megaroute.common import log
from megaroute.common.errors import UserError
from megaroute.evaluation import atlas, atlas_page, perplexity
from megaroute.evaluation.open import open_model
from megaroute.parallel import groups
from megaroute.platform import distributed


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="run directory (its newest checkpoint), or a checkpoint in it")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="text: JSON lines, Parquet, text files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the page and the tables")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field of the text (default text)")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N documents only")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows of a forward pass (default 8)")
    arguments = parser.parse_args(argv)
    for name in ("limit", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    arguments = parse_arguments(argv)
    try:
        print(write(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        groups.tear_down()
        distributed.stop()
    return 0


def write(arguments: argparse.Namespace) -> Path:
    """Make the page and the tables; the path of the page."""
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a file, so the tables have no place; name a folder")
    files = perplexity.text_files(arguments.files)
    log.configure()
    scorer = open_model(arguments.model)
    found = atlas.collect(scorer, files, arguments.batch, arguments.limit, arguments.text_field)
    tables = atlas.tables(found, scorer.tokenizer.pieces_text(range(scorer.config.model.vocab_size)))
    about = {
        "name": scorer.config.run.name,
        "step": scorer.step,
        "files": [file.path.name for file in files],
        "fewest": atlas.FEWEST,
    }
    return atlas_page.write(found, tables, about, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
