"""train, dev or test: by hash, so that a document keeps its side when the corpus grows.

The unit is the domain where domains are many and small, else the document; what the source
decided stands. No unit is on two sides.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlpt_data.documents import SourceDocument
from rlpt_data.manifest import SPLITS
from rlpt_data.strict import Strict, UserError

MIN_DOMAINS = 300
MAX_DOMAIN_SHARE = 0.05
_SALT = b"rlpt-split-1"


class SplitConfig(Strict):
    by: Literal["auto", "domain", "document"] = "auto"
    """auto: by domain if there are at least 300 and none holds more than 5% of the documents."""
    dev: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the units; 0: no such side."""
    test: float = Field(default=0.10, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _leaves_train(self) -> "SplitConfig":
        if self.dev + self.test >= 1.0:
            total = f"{self.dev + self.test:g}"
            raise ValueError(
                f"[split] dev + test = {total}: nothing is left to train on; lower one"
            )
        return self


def domain_of(document: SourceDocument) -> str:
    """The source's own, else the host of the URL, else ""."""
    if document.domain is not None:
        return document.domain
    try:
        host = urlsplit(document.url or "").hostname or ""
    except ValueError:  # a URL that is none, e.g. an unclosed bracket
        return ""
    return host.removeprefix("www.")


def assign(
    documents: Mapping[str, SourceDocument], config: SplitConfig
) -> tuple[dict[str, str], Literal["domain", "document", "source"]]:
    """document id -> split, and the unit that was used.

    Raises UserError when a side that was asked for is empty.
    """
    sizes = Counter(domain_of(document) for document in documents.values())
    unit = unit_of(list(sizes.values()), config)
    sides = {key: side_of(key, document, unit, config) for key, document in documents.items()}
    if all(document.split for document in documents.values()):
        unit = "source"
    check_sides(Counter(sides.values()), config, unit)
    return sides, unit


def unit_of(sizes: Sequence[int], config: SplitConfig) -> Literal["domain", "document"]:
    """The unit of the split, from the number of documents of each domain."""
    if config.by != "auto":
        return config.by
    small = max(sizes, default=0) <= MAX_DOMAIN_SHARE * sum(sizes)
    return "domain" if len(sizes) >= MIN_DOMAINS and small else "document"


def side_of(key: str, document: SourceDocument, unit: str, config: SplitConfig) -> str:
    """The side of one document, whose id is ``key``."""
    if document.split is not None:
        return document.split
    name = (domain_of(document) if unit == "domain" else "") or key
    hashed = hashlib.blake2b(name.encode(errors="replace"), digest_size=8, key=_SALT).digest()
    position = int.from_bytes(hashed, "big") / 2**64
    if position < config.test:
        return "test"
    return "dev" if position < config.test + config.dev else "train"


def check_sides(sizes: Mapping[str, int], config: SplitConfig, unit: str) -> None:
    """Refuse an empty side that was asked for. Raises UserError."""
    wanted = {"train": 1.0, "dev": config.dev, "test": config.test}
    for name in SPLITS:
        if wanted[name] and not sizes.get(name):
            total = sum(sizes.values())
            raise UserError(
                f"[split] {name}: none of {total} documents (by {unit}) falls there; "
                f"give more text, raise the share or use split.by=document"
            )
