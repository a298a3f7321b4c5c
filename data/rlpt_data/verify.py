"""Every checksum and every invariant of a shard folder, read from the bytes on disk."""

from pathlib import Path
from typing import Any

from rlpt_data.contamination import FILE, Index, read_index_bytes
from rlpt_data.manifest import NAME, SPLITS, Manifest, digest, digest_file
from rlpt_data.progress import shown
from rlpt_data.shard_rows import Document, misplaced
from rlpt_data.shards import ANNOTATIONS, ShardFolder
from rlpt_data.strict import UserError

_AGAIN = "run `rlpt data prepare` again"


def verify(path: Path, index: Path | None = None) -> dict[str, Any]:
    """What was checked, as counts. Raises UserError naming the file and the first broken rule.

    Documents are compared with evaluation sets once more: by ``index``, else by the folder's own.
    """
    folder = ShardFolder.open(path)
    manifest = folder.manifest
    if manifest.hash != manifest.content_hash():
        raise UserError(f"{path / NAME}: was changed after it was written; {_AGAIN}")
    _check_files(path, manifest)
    pieces = folder.token_bytes() if manifest.tokenizer_hash else None
    contamination = _index(path, index)
    seen: dict[str, str] = {}
    domains: dict[str, str] = {}
    counts = {name: _check_split(folder, name, pieces, seen, domains) for name in SPLITS}
    if contamination is not None:
        _check_decontaminated(folder, contamination)
    items = 0 if contamination is None else len(contamination.names)
    report = {"path": str(path), "hash": manifest.hash, "files": len(manifest.files)}
    return report | counts | {"evaluation_items": items}


def _index(path: Path, given: Path | None) -> Index | None:
    file = given or path / FILE
    if given is None and not file.is_file():
        return None
    return Index.from_bytes(read_index_bytes(file), str(file))


def _check_decontaminated(folder: ShardFolder, index: Index) -> None:
    for name in SPLITS:
        counts = folder.manifest.counts.get(name)
        split = folder.split(name) if counts and counts.documents else ()
        for document in shown(split, f"evaluation items, {name}", len(split)):
            if hit := index.hit(document.text):
                raise UserError(
                    f"{folder.path}/{name}, document {document.document_id}: holds {hit}; "
                    "prepare it with a decontaminate stage"
                )


def _check_files(path: Path, manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files} | {NAME}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in listed and not name.startswith(f"{ANNOTATIONS}/"):
            raise UserError(f"{file}: not in the manifest; remove it")
    files = shown(
        manifest.files, "checksums", len(manifest.files), unit="MB", size=lambda e: e.bytes / 1e6
    )
    for entry in files:
        found = digest_file(path / entry.path)
        if found != entry.blake2b:
            expected = f"the manifest says {entry.blake2b}"
            raise UserError(f"{path / entry.path}: checksum {found}, {expected}; {_AGAIN}")


def _check_split(
    folder: ShardFolder,
    name: str,
    pieces: list[bytes] | None,
    seen: dict[str, str],
    domains: dict[str, str],
) -> int:
    expected = folder.manifest.counts.get(name)
    if expected is None or not expected.documents:
        return 0
    tokens = size = 0
    split = folder.split(name)
    for document in shown(split, f"verify {name}", len(split)):
        where = f"{folder.path}/{name}, document {document.document_id}"
        for rule in broken_rules(document, folder.manifest.vocab_size, pieces):
            raise UserError(f"{where}: {rule}; {_AGAIN}")
        if document.document_id in seen:
            raise UserError(f"{where}: is also in {seen[document.document_id]}; {_AGAIN}")
        seen[document.document_id] = name
        by_domain = folder.manifest.split_by == "domain" and document.domain
        if by_domain and domains.setdefault(document.domain, name) != name:
            raise UserError(f"{where}: domain {document.domain} is in two splits; {_AGAIN}")
        tokens += document.num_tokens
        size += int(document.offsets[-1])
    found = (len(split), tokens, size)
    if found != (expected.documents, expected.tokens, expected.bytes):
        raise UserError(f"{folder.path}/{name}: {found} documents, tokens, bytes; {_AGAIN}")
    return len(split)


def broken_rules(document: Document, vocab_size: int, pieces: list[bytes] | None) -> list[str]:
    """Every invariant of a row that does not hold, in words."""
    data = document.text.encode()
    found = misplaced(document, vocab_size)
    if document.document_id != digest(data):
        found.append("its id is not the hash of its text")
    if not found and pieces is not None and b"".join(pieces[i] for i in document.ids) != data:
        found.append("its tokens are not its text")
    return found
