"""List, verify and show a folder of shards, or give webdataset shards of other makers a manifest and an index."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaroute.common.errors import DamagedShard, DataError, UserError
from megaroute.config.data import is_remote
from megaroute.data.foreign import recover_manifest
from megaroute.data.manifest import Manifest, load_manifest
from megaroute.data.shards import ShardSet, build_index, load_index
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.verify import check_same_tokenizer, check_shard

FOLDER = "the folder"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked against each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder of shards: a path, a URL, or pipe: and a command with {name}")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="compare sizes, checksums and indexes with the shards")
    action.add_argument("--show", type=int, metavar="N", help="show document N, counted from 0 over all shards")
    action.add_argument("--id", help="show the documents with this id")
    action.add_argument("--make-index", action="store_true", help="write the manifest and indexes of other tars")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="count tokens; check stored ones")
    parser.add_argument("--text-member", metavar="NAME", help="member with the text for --make-index (txt); json.FIELD")
    parser.add_argument("--overwrite", action="store_true", help="replace a manifest that exists")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if not arguments.make_index and (arguments.text_member or arguments.overwrite):
        parser.error("--text-member and --overwrite go with --make-index")
    if is_remote(arguments.folder) and (arguments.make_index or arguments.verify):
        parser.error("--make-index and --verify need a local folder; remote files are verified when they are fetched")
    return arguments


def listing(manifest: Manifest) -> Iterator[str]:
    """Lines of a table: one for each shard, and sums."""
    yield f"{'shard':<28} {'documents':>12} {'bytes':>16} {'text bytes':>16} {'tokens':>16}  sha256"
    for entry in manifest.shards:
        yield (
            f"{entry.name:<28} {entry.documents:>12,} {entry.bytes:>16,} {entry.text_bytes:>16,} "
            f"{_count(entry.tokens):>16}  {entry.sha256[:12]}"
        )
    size = sum(entry.bytes for entry in manifest.shards)
    yield (
        f"{f'{len(manifest.shards)} shards':<28} {manifest.documents:>12,} {size:>16,} {manifest.text_bytes:>16,} "
        f"{_count(manifest.tokens):>16}  {manifest.fingerprint[:12]}"
    )
    stored = f"; token ids stored as {manifest.token_type}" if manifest.token_type else ""
    yield f"text in {manifest.text or 'no member'}{stored}; tokenizer {(manifest.tokenizer or 'unknown')[:12]}"


def counted(shards: ShardSet, tokenizer: Tokenizer | None) -> Manifest:
    """The manifest, with tokens counted where it does not know them and there is a tokenizer."""
    manifest = shards.manifest
    if tokenizer is None or manifest.tokens is not None:
        return manifest
    totals = [0] * len(manifest.shards)
    for shard, document in tqdm(places(manifest), total=manifest.documents, unit="document", disable=None):
        totals[shard] += len(shards.encoded(shard, document, tokenizer))
    entries = [entry.model_copy(update={"tokens": total}) for entry, total in zip(manifest.shards, totals, strict=True)]
    return manifest.model_copy(update={"shards": tuple(entries), "tokenizer": tokenizer.fingerprint})


def verify(folder: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What is wrong, one sentence each: sizes, checksums, indexes, and with a tokenizer the stored tokens."""
    with ShardSet(folder, manifest, FOLDER) as shards:
        for number, entry in enumerate(tqdm(manifest.shards, unit="shard", disable=None)):
            try:
                check_shard(folder, entry, FOLDER, full=True)
                if build_index(folder / entry.name).tolist() != load_index(folder, entry, FOLDER).tolist():
                    yield f"{folder / entry.index} is not the index of its shard; write both anew, or copy them again"
                if tokenizer is not None:
                    yield from _verify_tokens(shards, number, tokenizer)
            except DamagedShard as error:
                yield str(error)


def _verify_tokens(shards: ShardSet, number: int, tokenizer: Tokenizer) -> Iterator[str]:
    entry = shards.manifest.shards[number]
    documents = range(entry.documents)
    total = sum(len(shards.encoded(number, document, tokenizer)) for document in documents)
    if entry.tokens is not None and total != entry.tokens:
        yield f"{entry.name} has {total} tokens, its manifest says {entry.tokens}; write the folder anew"
    if shards.manifest.token_type and shards.manifest.text:
        for document in documents:
            if shards.read_tokens(number, document).tolist() != tokenizer.encode(shards.read(number, document)):
                yield f"document {document} of {entry.name} has other ids than its text gives; write the folder anew"


def places(manifest: Manifest) -> Iterator[tuple[int, int]]:
    """(shard, document) of all documents, in order."""
    return ((shard, i) for shard, entry in enumerate(manifest.shards) for i in range(entry.documents))


def place_of(manifest: Manifest, number: int) -> tuple[int, int]:
    """(shard, document) of document `number`.  Raises DataError when there are not so many."""
    left = number
    for shard, entry in enumerate(manifest.shards):
        if 0 <= left < entry.documents:
            return shard, left
        left -= entry.documents
    raise DataError(f"--show {number}: documents are numbered 0 to {manifest.documents - 1}; give one of these")


def find(shards: ShardSet, name: str) -> list[tuple[int, int]]:
    """Places of the documents whose id is `name`.  Raises DataError when there is none."""
    bar = tqdm(places(shards.manifest), total=shards.manifest.documents, unit="document", disable=None)
    found = [place for place in bar if (shards.describe(*place) or {}).get("id") == name]
    if not found:
        raise DataError(f"--id {name!r}: no document has this id; look at some with --show")
    return found


def record(shards: ShardSet, place: tuple[int, int], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A document and where it is."""
    about = shards.describe(*place)
    known: dict[str, Any] = about if isinstance(about, dict) else {}
    shown: dict[str, Any] = {"shard": shards.manifest.shards[place[0]].name, "document": place[1], **known}
    if tokenizer is not None:
        shown["tokens"] = len(shards.encoded(*place, tokenizer))
    if shards.manifest.text is not None:
        return {**shown, "text": shards.read(*place)}
    ids = shards.read_tokens(*place)
    return {**shown, "text": tokenizer.decode(ids)} if tokenizer else {**shown, "ids": ids.tolist()}


def show(shown: dict[str, Any]) -> None:
    """Print a document: what is known of it in one line, then its text."""
    text = shown.pop("text", None)
    print(json.dumps(shown, ensure_ascii=False))
    if text is not None:
        print(text)


def make_index(arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> Manifest:
    """Recover the manifest of a folder that has none."""
    with tqdm(unit="B", unit_scale=True, disable=None, desc="indexing") as bar:
        return recover_manifest(
            Path(arguments.folder),
            text=arguments.text_member or "txt",
            tokenizer=tokenizer,
            overwrite=arguments.overwrite,
            progress=bar.update,
        )


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments ask for; the exit status."""
    tokenizer = Tokenizer(arguments.tokenizer, "--tokenizer") if arguments.tokenizer else None
    folder = arguments.folder
    manifest = make_index(arguments, tokenizer) if arguments.make_index else load_manifest(folder, FOLDER)
    if tokenizer is not None and not arguments.make_index:
        check_same_tokenizer(tokenizer, manifest, folder, FOLDER)
    if arguments.verify:
        wrong = list(verify(Path(folder), manifest, tokenizer))
        for sentence in wrong:
            print(f"error: {sentence}", file=sys.stderr)
        print(f"{folder}: {len(wrong)} faults in {len(manifest.shards)} shards, {manifest.documents:,} documents")
        return DataError.exit_code if wrong else 0
    with ShardSet(folder, manifest, FOLDER) as shards:
        if arguments.show is not None or arguments.id is not None:
            chosen = [place_of(manifest, arguments.show)] if arguments.id is None else find(shards, arguments.id)
            for place in chosen:
                shown = record(shards, place, tokenizer)
                print(json.dumps(shown, ensure_ascii=False)) if arguments.json else show(shown)
        elif arguments.json:
            print(counted(shards, tokenizer).model_dump_json(indent=2))
        else:
            print(*listing(counted(shards, tokenizer)), sep="\n")
    return 0


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    try:
        return run(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
