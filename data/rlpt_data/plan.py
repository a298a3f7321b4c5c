"""The plan of a preparation: everything its bytes depend on, written down before the first byte.

Inputs with size and hash, the configuration, and every version that changes bytes; ``plan_id`` is
the hash of it all. Finished work counts only where the part of the plan that it depends on is the
same.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpt_data import sources
from rlpt_data.manifest import digest, digest_file
from rlpt_data.mixing import Part
from rlpt_data.strict import Strict, json_of, parse

NAME = "plan.json"
LIBRARIES = (
    *("numpy", "pyarrow", "tokenizers", "zstandard", "regex", "datasets", "datatrove", "spacy"),
    *("trafilatura", "lxml", "lxml_html_clean", "htmldate", "courlan", "justext", "resiliparse"),
    *("brotli", "faust-cchardet", "tldextract", "fasttext-predict"),
)
"""Whoever of these is installed may have a part in the bytes."""


READ_KEYS = ("recipe", "stages", "split", "max_documents")
"""Of the configuration, beside the source; the others count from the encoding pass on."""


class Input(Strict):
    """One file of the corpus, or the corpus itself where it has no files."""

    name: str
    bytes: int
    blake2b: str | None
    """None: the source cannot tell."""


class Plan(Strict):
    plan_id: str
    inputs: tuple[Input, ...]
    units: tuple[str, ...]
    resources: dict[str, str]
    """Other files the bytes depend on (a tokenizer, an index): what for -> blake2b-128."""
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def read_basis(self) -> str:
        """Hash of what every unit of the reading pass depends on, whichever its input is."""
        # The tokenizer comes later.
        files = {key: value for key, value in self.resources.items() if key != "tokenizer"}
        config = {key: self.config.get(key) for key in READ_KEYS}
        return _hash([config, files, self.versions])

    def part_bases(self, parts: Sequence[Part]) -> list[str]:
        """For each unit the hash of what its bytes depend on: nothing of another input."""
        before = self.read_basis
        inputs = {each.name: each.model_dump(mode="json") for each in self.inputs}
        return [
            _hash([before, part.name, part.config.model_dump(mode="json"), inputs[part.input]])
            for part in parts
        ]

    def computed_id(self) -> str:
        return _hash(self.model_dump(mode="json", exclude={"plan_id"}))


def _hash(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())


def make_plan(parts: Sequence[Part], resources: Mapping[str, str], config: dict[str, Any]) -> Plan:
    """Hash the inputs, each file once."""
    first: dict[str, Part] = {}
    for part in parts:
        first.setdefault(part.input, part)
    plan = Plan(
        plan_id="",
        inputs=tuple(_input(part) for part in first.values()),
        units=tuple(part.name for part in parts),
        resources=dict(sorted(resources.items())),
        config=config,
        versions=versions(),
    )
    return plan.model_copy(update={"plan_id": plan.computed_id()})


def _input(part: Part) -> Input:
    path = part.unit.path
    if path is None:
        return Input(name=part.input, bytes=0, blake2b=sources.fingerprint(part.config))
    try:
        return Input(name=part.input, bytes=path.stat().st_size, blake2b=digest_file(path))
    except OSError:
        # The unit that reads it is quarantined with the error; other inputs go on.
        return Input(name=part.input, bytes=0, blake2b=None)


def versions() -> dict[str, str]:
    """Of the interpreter and of every installed library that has a part in the bytes."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_plan(path: Path) -> Plan | None:
    """The plan at ``path``; None when there is none that is whole."""
    try:
        table = json_of(path.read_bytes())
    except (OSError, ValueError):
        return None
    return parse(Plan, table, str(path))


def difference(old: Plan, new: Plan) -> str:
    """What keeps ``new`` from going on where ``old`` stopped, in words; "" when nothing does."""
    if old.plan_id == new.plan_id:
        return ""
    changes = [
        *_changes("input", _by_name(old), _by_name(new)),
        *_changes("file for", old.resources, new.resources),
        *_changes("config", old.config, new.config),
        *_changes("version of", old.versions, new.versions),
    ]
    return ", ".join(changes[:4]) or "other units"


def _by_name(plan: Plan) -> dict[str, Any]:
    return {found.name: (found.bytes, found.blake2b) for found in plan.inputs}


def _changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [f"{what} {key}" for key in keys]
