"""Documents as members of a tar file, read from their bytes.

Done here and not by webdataset, whose import brings torch: 200 MB and seconds for every process that reads, where a
header is 512 bytes.
"""

import io
import re
import tarfile

BLOCK = tarfile.BLOCKSIZE  # tar pads every member to a multiple of it
NOTES = re.compile(r"__[^/]*__($|/)")  # members on the whole tar; webdataset passes over them


def document_members(raw: bytes) -> dict[str, bytes]:
    """Contents of the members of one document, by extension in lower case, from their whole blocks `raw`.

    As webdataset groups them: a document's members share the name up to the first dot of its last part, and members
    without a dot belong to none.  Raises tarfile.TarError when a header is damaged, ValueError when a member is cut
    off or there, by its extension, twice, or the members are of no or several documents.
    """
    found: dict[str, bytes] = {}
    keys = set()
    for name, content in _plain_members(raw) or _any_members(raw):
        folder, slash, last = name.rpartition("/")
        stem, dot, extension = last.partition(".")
        if not dot or not stem or NOTES.match(name):
            continue
        keys.add(folder + slash + stem)
        if extension.lower() in found:
            raise ValueError(f"two members {name!r}")
        found[extension.lower()] = content
    if len(keys) != 1:
        raise ValueError(f"{len(keys)} documents where 1 should be")
    return found


def _plain_members(raw: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of regular files; nothing where a header says more than a name and a size."""
    members, at = [], 0
    while at < len(raw):
        head = raw[at : at + BLOCK]
        if len(head) < BLOCK or head[156:157] not in (b"0", b"\0") or head[345] or head[124] & 0x80:
            return []
        # As tar defines it: the sum of the header's bytes with the checksum's own field read as spaces.
        if sum(head) - sum(head[148:156]) + 8 * 32 != int(head[148:156].strip(b" \0") or b"0", 8):
            raise tarfile.ReadError("bad checksum of a member's header")
        size = int(head[124:136].strip(b" \0") or b"0", 8)
        start = at + BLOCK
        at = start + -(-size // BLOCK) * BLOCK
        name = head[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
        if at > len(raw):
            raise ValueError(f"member {name!r} is cut off")
        members.append((name, raw[start : start + size]))
    return members


def _any_members(raw: bytes) -> list[tuple[str, bytes]]:
    members = []
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is not None:
                members.append((info.name, file.read()))
    return members
