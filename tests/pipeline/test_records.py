"""Groups in files: back bit for bit, damage noticed, other texts refused; and a run that trains on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rlpt import dist
from rlpt.config import PromptConfig
from rlpt.lots import Lot, lot_of, lot_row
from rlpt.prompts import Stream, prompt_stream, prompts_of, trunk
from rlpt.rollout.records import group_row, groups_of, packed, unpacked
from rlpt.saved_supply import SavedSupply, groups_path
from rlpt.stages import RLStage
from rlpt.types import Group, Markers, Prompt, Rollout
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

MARKERS = Markers(320, 321)
CFG = PromptConfig(context_tokens=24, min_context_tokens=6, horizon_tokens=5, cuts_per_document=2)
SEED = 3
ODD = np.array([-0.1, -np.inf, -1e-45, np.nextafter(np.float32(-3), np.float32(0)), -0.0])


def rollout(draw: np.random.Generator, version: int) -> Rollout:
    ids = draw.integers(0, 322, 6)
    action = np.array([True, True, True, True, True, False])
    logp = np.append(ODD, 0.0).astype(np.float32)
    return Rollout(ids, action, logp, np.arange(version, version + 6), 5, "budget")


def group(prompt: Prompt, version: int = 0, seed: int = 0) -> Group:
    draw = np.random.default_rng(seed)
    return Group(prompt, tuple(rollout(draw, version + g) for g in range(3)))


@pytest.fixture(scope="module")
def stream(shards: ShardFolder) -> Stream:
    return prompt_stream(shards.split("train"), CFG, SEED, "rl")


def lot(stream: Stream, position: int, version: int = 0) -> Lot:
    epoch, document = stream.at(position)
    prompts = prompts_of(trunk(document, epoch, CFG, SEED), CFG, MARKERS)
    groups = [group(prompt, version, position) for prompt in prompts]
    return Lot(position, prompts, [], groups, uses=1)


def same(one: Group, other: Group) -> bool:
    for x, y in zip(one.rollouts, other.rollouts, strict=True):
        for name in ("ids", "action", "logp", "version"):
            mine, its = getattr(x, name), getattr(y, name)
            if mine.dtype != its.dtype or mine.tobytes() != its.tobytes():
                return False
        if (x.thought_len, x.finish) != (y.thought_len, y.finish):
            return False
    return one.prompt.key == other.prompt.key


def test_groups_come_back_bit_for_bit(stream: Stream) -> None:
    for position in range(12):
        known = lot(stream, position, version=position)
        (row,) = unpacked(packed([lot_row(known, "kept")]), "file")
        found = lot_of(row, stream, CFG, MARKERS, SEED, "file")
        assert (row["place"], found.position, found.uses) == ("kept", position, 1)
        assert found.groups
        assert known.groups
        assert len(found.groups) == len(known.groups)
        assert all(same(*pair) for pair in zip(found.groups, known.groups, strict=True))
        assert [p.key for p in found.prompts] == [p.key for p in known.prompts]


def test_a_document_without_groups_comes_back_without(stream: Stream) -> None:
    known = lot(stream, 4)
    known.groups, known.uses = None, 0
    (row,) = unpacked(packed([lot_row(known, "waiting")]), "file")
    found = lot_of(row, stream, CFG, MARKERS, SEED, "file")
    assert (found.groups, found.uses, found.position) == (None, 0, 4)


def test_groups_find_their_prompts_by_cut_whatever_the_order(stream: Stream) -> None:
    prompts = next(each for p in range(99) if len(each := lot(stream, p).prompts) == 2)
    groups = [group(prompt, seed=n) for n, prompt in enumerate(prompts)]
    found = groups_of([group_row(each) for each in reversed(groups)], prompts, "file")
    assert [each.prompt for each in found] == prompts[::-1]
    assert same(found[0], groups[1])
    assert not same(found[0], groups[0])


def is_damaged(data: bytes) -> bool:
    try:
        unpacked(data, "file")
    except UserError as error:
        return str(error).startswith("file: damaged: ") and "another checkpoint" in str(error)
    return False


def test_every_damaged_byte_is_noticed_or_harmless(stream: Stream) -> None:
    rows = [lot_row(lot(stream, 0), "kept")]
    data = packed(rows)
    harmless = 0
    for at in range(len(data)):
        for bit in (0, 3, 7):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            if not is_damaged(bytes(damaged)):
                # A frame header has bits without a meaning.
                assert str(unpacked(bytes(damaged), "file")) == str(rows), (at, bit)
                harmless += 1
    assert harmless <= 8


def test_every_cut_of_a_file_is_noticed(stream: Stream) -> None:
    data = packed([lot_row(lot(stream, 0), "kept")])
    for stop in range(len(data)):
        with pytest.raises(UserError, match="file: damaged"):
            unpacked(data[:stop], "file")


def test_no_rows_are_no_rows() -> None:
    assert unpacked(packed([]), "file") == []


def test_thoughts_of_another_seed_or_other_cuts_are_refused(stream: Stream) -> None:
    document = stream.at(0)[1]
    known = lot(stream, 0)
    row = lot_row(known, "kept")
    cut = row["groups"][0]["cut"]
    row["groups"][0]["cut"] = cut + 1
    with pytest.raises(UserError) as error:
        lot_of(row, stream, CFG, MARKERS, SEED, "file")
    assert str(error.value) == (
        f"file: holds thoughts before token {cut + 1} of document {document.document_id}, which these shards and this "
        "seed do not cut there; use the run's own shards, prompts and seed"
    )
    others = [
        lot_row(lot(stream, p), "kept") | {"position": p + 1}
        for p in range(3)
    ]  # fmt: skip
    for other in others:
        with pytest.raises(UserError, match="use the run's own shards"):
            lot_of(other, stream, CFG, MARKERS, SEED, "file")
    twice = lot_row(known, "kept")
    twice["cuts"] = [twice["cuts"][0], *twice["cuts"]]
    with pytest.raises(UserError, match=r"^file: holds the document at position 0 with cuts at \["):
        lot_of(twice, stream, CFG, MARKERS, SEED, "file")
    # The same document in another epoch is another sample of it.
    count = len(stream.usable)
    again = next(
        p for p in range(count, 2 * count) if stream.at(p)[1].document_id == document.document_id
    )
    moved = lot_row(known, "kept") | {"position": again}
    cuts = [prompt.key[2] for prompt in lot(stream, again).prompts]
    if any(each["cut"] not in cuts for each in moved["groups"]):
        with pytest.raises(UserError, match="do not cut there"):
            lot_of(moved, stream, CFG, MARKERS, SEED, "file")


# ---- training on saved groups ----------------------------------------------------------------------


def saved(
    run_dir: Path, stream: Stream, world: dist.World, own: bool = True, **sizes: int
) -> SavedSupply:
    sizes = {"documents_per_step": 4, "group_size": 3} | sizes
    stage = RLStage(kind="rl", name="rl", steps=5, **sizes)
    return SavedSupply(run_dir, own, stream, CFG, stage, MARKERS, SEED, world)


@pytest.fixture
def run_dir(tmp_path: Path, stream: Stream) -> Path:
    """Steps 1 and 2 of a run: four documents each, written in no order."""
    (tmp_path / "groups").mkdir()
    for step in (1, 2):
        rows = [lot_row(lot(stream, 4 * step + n, step), "trained") for n in (2, 0, 3, 1)]
        groups_path(tmp_path, step).write_bytes(packed(rows))
    return tmp_path


def test_a_step_is_trained_on_what_was_saved_for_it(run_dir: Path, stream: Stream) -> None:
    supply = saved(run_dir, stream, dist.World(0, 1, torch.device("cpu")))
    for version in (0, 1):
        batch = supply.take(version, 5 - version)
        step = version + 1
        assert batch.positions == [4 * step + n for n in range(4)]
        known = [g for n in range(4) for g in lot(stream, 4 * step + n, step).groups or ()]
        assert all(same(*pair) for pair in zip(batch.groups, known, strict=True))
        assert len(batch.groups) == len(known)
        supply.trained(batch)
        assert supply.next == 4 * step
        assert supply.rows() == []


def test_groups_of_another_run_are_of_no_version_of_this_one(run_dir: Path, stream: Stream) -> None:
    world = dist.World(0, 1, torch.device("cpu"))
    mine, foreign = (saved(run_dir, stream, world, own).take(0, 5) for own in (True, False))
    assert foreign.positions == mine.positions
    assert foreign.sums == {}
    assert mine.sums["staleness/mean"][1] > 0
    for one, other in zip(foreign.groups, mine.groups, strict=True):
        for rollout, known in zip(one.rollouts, other.rollouts, strict=True):
            assert set(rollout.version.tolist()) == {-1}
            assert rollout.ids.tolist() == known.ids.tolist()
            assert rollout.logp.tobytes() == known.logp.tobytes()


def test_ranks_share_what_was_saved(run_dir: Path, stream: Stream) -> None:
    found = [
        saved(run_dir, stream, dist.World(rank, 3, torch.device("cpu"))).take(0, 5).positions
        for rank in range(3)
    ]
    assert found == [[4, 7], [5], [6]]


def test_a_step_that_was_not_saved_is_a_mistake_with_a_remedy(
    run_dir: Path, stream: Stream
) -> None:
    supply = saved(run_dir, stream, dist.World(0, 1, torch.device("cpu")))
    with pytest.raises(UserError) as error:
        supply.take(2, 3)
    assert str(error.value) == (
        f"rollout.saved = {run_dir}: has no step_000003.jsonl.zst, so no groups for step 3; save them with "
        "rollout.save_groups = true, or lower the stage's steps"
    )


@pytest.mark.parametrize(
    ("name", "holds", "asked"), [("documents_per_step", 4, 5), ("group_size", 3, 4)]
)
def test_saved_steps_of_other_sizes_are_refused(
    run_dir: Path, stream: Stream, name: str, holds: int, asked: int
) -> None:
    supply = saved(run_dir, stream, dist.World(0, 1, torch.device("cpu")), **{name: asked})
    told = rf"holds steps of {name} = \[{holds}\], stage rl has {asked}; use the saved run's"
    with pytest.raises(UserError, match=told):
        supply.take(0, 5)


def test_damaged_groups_are_named(run_dir: Path, stream: Stream) -> None:
    path = groups_path(run_dir, 1)
    path.write_bytes(path.read_bytes()[:-7])
    supply = saved(run_dir, stream, dist.World(0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match=rf"{path}: damaged"):
        supply.take(0, 5)
