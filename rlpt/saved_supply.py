"""Every step's groups as a run wrote them, in the place of a supply that asks an engine."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.lots import Batch, ages, lot_of
from rlpt.prompts import Samples
from rlpt.reward.base import Rewarded
from rlpt.rollout.records import Row, supply_rows
from rlpt.stages import RLStage
from rlpt.types import Group, Markers
from rlpt_data.strict import UserError


class SavedSupply:
    """Every step's groups as a run wrote them: no engine samples anything.

    Another run's (``own`` false) come from weights that this one never had: their versions are none of its own.
    """

    samples = False

    def __init__(
        self,
        run_dir: Path,
        own: bool,
        stream: Samples,
        cfg: PromptConfig,
        stage: RLStage,
        markers: Markers,
        seed: int,
        world: dist.World,
    ) -> None:
        self.run_dir = run_dir
        self.own = own
        self.stream = stream
        self.cfg = cfg
        self.stage = stage
        self.markers = markers
        self.seed = seed
        self.world = world
        self.next = 0

    def take(self, step: int, steps_left: int) -> Batch:
        """The groups that trained version ``step`` there. Raises UserError where there are none, or others."""
        path = groups_path(self.run_dir, step + 1)
        if not path.is_file():
            raise UserError(
                f"rollout.saved = {self.run_dir}: has no {path.name}, so no groups for step {step + 1}; save them "
                "with rollout.save_groups = true, or lower the stage's steps"
            )
        rows = sorted(supply_rows(path.read_bytes(), str(path)), key=lambda row: row["position"])
        self._check(rows, path)
        lots = [
            lot_of(row, self.stream, self.cfg, self.markers, self.seed, str(path))
            for row in dist.share(rows, self.world)
        ]
        self.next += self.stage.documents_per_step
        groups = [group for lot in lots for group in lot.groups or ()]
        positions = [lot.position for lot in lots]
        sums = self.stream.sums(positions)
        if not self.own:
            return Batch(positions, [foreign(group) for group in groups], sums, lots)
        return Batch(positions, groups, ages(groups, step) | sums, lots)

    def _check(self, rows: Sequence[Row], path: Path) -> None:
        sizes = {len(group["rollouts"]) for row in rows for group in row["groups"] or ()}
        for name, found in (("documents_per_step", {len(rows)}), ("group_size", sizes)):
            if found != {getattr(self.stage, name)}:
                raise UserError(
                    f"{path}: holds steps of {name} = {sorted(found)}, stage {self.stage.name} has "
                    f"{getattr(self.stage, name)}; use the saved run's"
                )

    def rated(self, batch: Batch, rewarded: Rewarded) -> None:
        """Saved groups are what they are: nothing is asked for by what they were worth."""

    def trained(self, batch: Batch) -> None:
        """Saved groups are trained as often as they were saved."""

    def rows(self) -> list[Row]:
        return []

    def restore(self, rows: Iterable[Row], cursor: int, where: str) -> None:
        self.next = cursor

    def close(self) -> None:
        """Nothing is under way."""


def foreign(group: Group) -> Group:
    """A group whose tokens no version of this run sampled."""
    rollouts = (replace(r, version=np.full_like(r.version, -1)) for r in group.rollouts)
    return replace(group, rollouts=tuple(rollouts))


def groups_path(run_dir: Path, step: int) -> Path:
    """The groups of a step, named like its line of metrics."""
    return run_dir / "groups" / f"step_{step:06d}.jsonl.zst"
