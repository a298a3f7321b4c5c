"""The stages that a configuration may name, and the two lists they make.

Stages before the first that is about the whole corpus or about what is released (near-duplicates,
decontaminate, pii) run where documents are read; the others after duplicates are gone.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from rlpt_data.choosing import LanguageConfig, UrlBlockListConfig
from rlpt_data.contamination import FILE, DecontaminateConfig, read_index_bytes
from rlpt_data.duplicates import AGAIN, EXACT, NEAR, NearDuplicatesConfig
from rlpt_data.filters import ALWAYS, EXTRACT, READ, Stage
from rlpt_data.pii import PiiConfig
from rlpt_data.quality import QualityConfig
from rlpt_data.strict import UserError

StageConfig = Annotated[
    UrlBlockListConfig
    | LanguageConfig
    | QualityConfig
    | NearDuplicatesConfig
    | DecontaminateConfig
    | PiiConfig,
    Field(discriminator="kind"),
]
_LATER = (NEAR, "decontaminate", "pii")
ENCODE = "encode"


def near_duplicates(stages: Sequence[Any]) -> NearDuplicatesConfig | None:
    """The configuration of that stage, if it is there."""
    return next((stage for stage in stages if isinstance(stage, NearDuplicatesConfig)), None)


def before(stages: Sequence[Any]) -> list[Any]:
    """Those that run where documents are read."""
    return list(stages[: _turn(stages)])


def after(stages: Sequence[Any]) -> list[Any]:
    """Those that run when duplicates are gone."""
    return [stage for stage in stages[_turn(stages) :] if stage.kind != NEAR]


def _turn(stages: Sequence[Any]) -> int:
    later = [number for number, stage in enumerate(stages) if stage.kind in _LATER]
    return min(later, default=len(stages))


def built(stages: Sequence[Any]) -> list[Stage]:
    """Ready to run. Raises UserError when one needs what is not there."""
    return [Stage(stage.kind, stage.build()) for stage in stages]


def names(stages: Sequence[Any], last_of_all: Sequence[str] = ()) -> list[str]:
    """Every stage, in the order in which documents meet them; ``last_of_all`` before encoding."""
    near = [NEAR] if near_duplicates(stages) else []
    first = [READ, EXTRACT, *(stage.name for stage in ALWAYS)]
    middle = [stage.kind for stage in before(stages)]
    last = [stage.kind for stage in after(stages)]
    again = [AGAIN] if last else []
    return [*first, *middle, EXACT, *near, *last, *again, *last_of_all, ENCODE]


def contamination_index(stages: Sequence[Any]) -> dict[str, bytes]:
    """The index of that stage, as a file of the shard folder; empty where there is none."""
    guard = next((stage for stage in stages if isinstance(stage, DecontaminateConfig)), None)
    return {FILE: read_index_bytes(guard.index)} if guard else {}


def check_guarded(stages: Sequence[Any], waived: bool) -> None:
    """Refuse a corpus that nobody compared with evaluation sets. Raises UserError."""
    if not waived and not contamination_index(stages):
        raise UserError(
            "[stages]: no decontaminate, so evaluation items may be among the documents; write an "
            "index with `rlpt data index` and name it, or say without_decontamination = true"
        )


def resources(stages: Sequence[Any]) -> dict[str, str]:
    """Hashes of the files that stages read: what for -> blake2b-128."""
    found: dict[str, str] = {}
    for stage in stages:
        if hasattr(stage, "resources"):
            found |= stage.resources()
    return found
