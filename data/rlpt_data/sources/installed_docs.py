"""The documentation that is on every machine: no network, no licence question, real prose.

In this order, until there is enough: the interpreter's help topics, the READMEs of installed
packages, the docstrings of the standard library, the docstrings of installed packages. One
document per topic, README or module. Modules are parsed, never imported.
"""

import ast
import importlib.metadata
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.manifest import digest
from rlpt_data.provenance import Source

_OURSELVES = "rlpt"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
_Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class InstalledDocsConfig(Source):
    kind: Literal["installed-docs"]
    max_bytes: int = Field(default=4_000_000, ge=1)
    """Stop after about this many bytes of text."""
    min_bytes: int = Field(default=400, ge=0)
    """Leave out shorter documents: most modules say only a line."""


def documents(config: InstalledDocsConfig) -> Iterator[SourceDocument | Drop]:
    """The same machine gives the same documents; another one has other packages."""
    total = 0
    for found in _everything():
        size = len(found.text.encode("utf-8", errors="replace"))
        if size < config.min_bytes:
            continue
        yield found
        total += size
        if total >= config.max_bytes:
            return


def fingerprint(config: InstalledDocsConfig) -> str:
    """Of the interpreter and the installed versions."""
    versions = [f"{d.name} {d.version}" for d in _distributions()]
    return digest("\n".join([platform.python_version(), *versions]).encode())


def _everything() -> Iterator[SourceDocument]:
    yield from _topics()
    yield from _readmes()
    standard_library = Path(sysconfig.get_path("stdlib"))
    yield from _modules("python", standard_library, _sources(standard_library))
    for distribution in _distributions():
        root = Path(str(distribution.locate_file("")))
        paths = [root / str(file) for file in distribution.files or () if file.suffix == ".py"]
        yield from _modules(distribution.name, root, sorted(paths))


def _distributions() -> list[importlib.metadata.Distribution]:
    """Installed packages but ours, by name; of two installed versions the first on the path."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name.lower() != _OURSELVES:
            found.setdefault(name.lower(), distribution)
    return [found[name] for name in sorted(found)]


def _topics() -> Iterator[SourceDocument]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield SourceDocument(text.strip() + "\n", url=f"topic:{name}", domain="python-topics")


def _readmes() -> Iterator[SourceDocument]:
    for distribution in _distributions():
        text = distribution.metadata.get_payload()  # pyright: ignore[reportAttributeAccessIssue]
        if text:
            yield SourceDocument(
                text.strip() + "\n", url=f"readme:{distribution.name}", domain=distribution.name
            )


def _sources(root: Path) -> list[Path]:
    """Python files below ``root``, without descending into what is left out anyway."""
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - _SKIPPED)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _modules(domain: str, root: Path, paths: list[Path]) -> Iterator[SourceDocument]:
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts if path.is_relative_to(root) else ()
        if not parts or _SKIPPED.intersection(parts):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        if text := _docstrings(path, name):
            yield SourceDocument(text, url=f"module:{name}", domain=domain)


def _docstrings(path: Path, name: str) -> str:
    """Docstrings of a module in source order under their signatures; "" when there is none."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return ""
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        # Packages ship templates and sources of other versions: not a module, so no document.
        return ""
    entries = list(_entries(tree, f"module {name}"))
    return "\n\n".join(entries) + "\n" if entries else ""


def _entries(scope: _Scope, title: str) -> Iterator[str]:
    if text := ast.get_docstring(scope):
        yield f"{title}\n\n{text}"
    for child in scope.body:
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            yield from _entries(child, f"class {child.name}({bases})")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(child, f"{child.name}({ast.unparse(child.args)})")
