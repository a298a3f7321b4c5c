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

    name: str
    """In a mixture; "" for a source that stands alone."""
    weight: float | None
    """In a mixture."""
    kind: str
    place: str
    """Its path, or its name on the hub; "" for a source that has neither."""
    licence: str | None
    notes: str | None


def sources_of(config: Mapping[str, Any]) -> list[Stated]:
    """The sources of a manifest's configuration; none for shards that were not read from any."""
    merged = [stated for each in config.get("merged", ()) for stated in sources_of(each["config"])]
    alone = [_stated(config["source"])] if config.get("source") else []
    mixed = [
        _stated(each["source"], each["name"], each["weight"]) for each in config.get("sources", ())
    ]
    return [*merged, *alone, *mixed]


def _stated(table: Mapping[str, Any], name: str = "", weight: float | None = None) -> Stated:
    return Stated(
        name=name,
        weight=weight,
        kind=table["kind"],
        place=str(table.get("path") or table.get("name") or ""),
        licence=table.get("licence"),
        notes=table.get("notes"),
    )


def licence_of(config: Mapping[str, Any]) -> str | None:
    """The licence of all of the text; None where it is not stated or differs between sources."""
    stated = {source.licence for source in sources_of(config)}
    return stated.pop() if len(stated) == 1 else None
