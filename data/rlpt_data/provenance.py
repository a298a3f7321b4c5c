"""What a configuration says about where its text is from; the manifest keeps it with the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlpt_data.strict import Grown


class Source(Grown):
    """Base of every ``[source]``."""

    LATER: ClassVar[tuple[str, ...]] = ("licence", "notes")
    licence: str | None = None
    """Under which terms the text may be used, as CC0-1.0; None: not stated."""
    notes: str | None = None
    """Anything else a reader of the datasheet should know: terms of use, how it was collected."""


@dataclass(frozen=True)
class Stated:
    """What a manifest says about one source."""

    kind: str
    place: str
    """Its path, or its name on the hub; "" for a source that has neither."""
    licence: str | None
    notes: str | None


def sources_of(config: Mapping[str, Any]) -> list[Stated]:
    """The sources of a manifest's configuration; none for shards that were not read from any."""
    tables = [each["source"] for each in (config, *config.get("sources", ())) if each.get("source")]
    return [
        Stated(
            kind=table["kind"],
            place=str(table.get("path") or table.get("name") or ""),
            licence=table.get("licence"),
            notes=table.get("notes"),
        )
        for table in tables
    ]


def licence_of(config: Mapping[str, Any]) -> str | None:
    """The licence of all of the text; None where it is not stated or differs between sources."""
    stated = {source.licence for source in sources_of(config)}
    return stated.pop() if len(stated) == 1 else None
