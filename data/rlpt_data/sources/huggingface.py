"""A dataset of the Hugging Face hub, or a local folder in one of its formats, streamed."""

from collections.abc import Iterator
from typing import Literal

from rlpt_data.documents import Drop, SourceDocument
from rlpt_data.manifest import digest
from rlpt_data.provenance import Source
from rlpt_data.sources.records import Fields, document
from rlpt_data.strict import UserError


class HuggingfaceConfig(Source):
    kind: Literal["huggingface"]
    name: str
    """Name on the hub, or a local folder."""
    config: str | None = None
    revision: str | None = None
    """A commit hash makes the corpus repeatable; without one a rerun reads it again."""
    split: str = "train"
    fields: Fields = Fields()


def documents(config: HuggingfaceConfig) -> Iterator[SourceDocument | Drop]:
    """Raises UserError when datasets is not installed or the dataset cannot be opened."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "[source] kind = huggingface needs datasets; pip install 'rlpt[data]'"
        ) from error
    where = f"{config.name}/{config.config or 'default'}/{config.split}"
    try:
        rows = datasets.load_dataset(
            config.name, config.config, split=config.split, revision=config.revision, streaming=True
        )
    except (OSError, ValueError) as error:  # absent, unreachable, or no such configuration
        first = str(error).strip().splitlines()[0]
        raise UserError(f"[source] name = {config.name}: {first}; correct the name") from error
    for number, row in enumerate(rows):
        yield document(row, config.fields, f"{where}:{number}")


def fingerprint(config: HuggingfaceConfig) -> str | None:
    """Known only for a pinned revision."""
    return digest(config.model_dump_json().encode()) if config.revision else None
