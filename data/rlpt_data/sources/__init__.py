"""Where documents come from. A source is a configuration with a ``kind`` and two functions:

``documents(config)`` yields documents and drops; ``fingerprint(config)`` identifies the corpus, or
is None when it cannot. A source of many files also has ``units(config)`` and ``read(config, unit)``,
and workers share it out. A new source is a new file and a line in each table below.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from rlpt_data import proving
from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.manifest import digest
from rlpt_data.sources import folder, huggingface, installed_docs, jsonl, parquet, warc
from rlpt_data.sources.units import Unit

SOURCES: dict[str, ModuleType] = {
    "folder": folder,
    "huggingface": huggingface,
    "installed-docs": installed_docs,
    "jsonl": jsonl,
    "parquet": parquet,
    "proving": proving,
    "warc": warc,
}

SourceConfig = Annotated[
    folder.FolderConfig
    | huggingface.HuggingfaceConfig
    | installed_docs.InstalledDocsConfig
    | jsonl.JsonlConfig
    | parquet.ParquetConfig
    | proving.ProvingConfig
    | warc.WarcConfig,
    Field(discriminator="kind"),
]


def units(config: Any) -> list[Unit]:
    """What workers can read apart from one another; at least one."""
    source = SOURCES[config.kind]
    return source.units(config) if hasattr(source, "units") else [Unit(config.kind)]


def read(config: Any, unit: Unit) -> Iterator[SourceDocument | Drop]:
    """The documents and drops of one unit."""
    if unit.path is None:
        return documents(config)
    return SOURCES[config.kind].read(config, unit)


def documents(config: Any) -> Iterator[SourceDocument | Drop]:
    """Everything the configured source holds, in its own order."""
    yield from SOURCES[config.kind].documents(config)


def fingerprint(config: Any) -> str | None:
    """Of the corpus; a generated one is determined by its configuration."""
    if config.kind == "proving":
        return digest(config.model_dump_json().encode())
    return SOURCES[config.kind].fingerprint(config)
