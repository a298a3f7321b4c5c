"""The entropy curriculum: which tier a sample's cuts are of, and what it falls to, by hand and through a run."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlpt import session
from rlpt.config import DataConfig, RunConfig
from rlpt.curriculum import EntropyCurriculum
from rlpt.mixture import open_shards, stage_stream
from rlpt.prompts import trunk_at
from rlpt.runlog import read_journal
from rlpt.tiers import TIERS, TieredSamples, nearest
from rlpt.train import run
from rlpt_data import annotations
from rlpt_data.annotations import Annotation, AnnotationFacts, SidecarWriter
from rlpt_data.manifest import digest_file
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import CUT_KINDS, Document, ShardFolder
from rlpt_data.strict import UserError, load, parse

BOUNDS = (0.5, 1.0, 1.5)
WORDS = [
    "stage.0.steps=2", "stage.1.steps=6", "stage.1.documents_per_step=4", "evaluation.every=0",
    "stage.1.reward={kind='match',how='first_token'}", "thought.prediction_tokens=2",
    "stage.1.objective={}", "stage.1.advantage={}", "stage.1.curriculum={}",
    "stage.1.budget={kind='decay',start=5}",
    "stage.1.gates=[{kind='length_budget',tokens='budget',weight=0.1}]",
    "data.cuts={min_context=8,min_continuation=4}", "checkpoint.every=2",
]  # fmt: skip


def entropies(document: Document, number: int) -> np.ndarray:
    """Every third document has no hard position, every fourth no easy one."""
    low, high = 0.5 if number % 4 else 1.1, 2.5 if number % 3 else 1.4
    values = np.random.default_rng(number).uniform(low, high, document.num_tokens)
    return np.concatenate([[np.nan], values[1:]]).astype(np.float32)


def annotated(source: Path, path: Path) -> Path:
    """A copy of a shard folder, with a proxy's entropies made here."""
    shutil.copytree(source, path)
    shards = ShardFolder.open(path)
    folder = path / annotations.FOLDER / "000"
    for name in shards.shard_files():
        with SidecarWriter(folder / name) as writer:
            for number, document in enumerate(shards.file(name)):
                value = entropies(document, number)
                rank = np.zeros(len(value), np.uint32)
                writer.add([Annotation(document.document_id, value, value, value, rank)])
    sidecars = {name: digest_file(folder / name) for name in shards.shard_files()}
    facts = {"model": "none", "window": 8, "short_window": 4, "files": shards.shard_files()}
    annotations.write_facts(folder, AnnotationFacts(proxy="000", sidecars=sidecars, **facts))
    return path


@pytest.fixture(scope="module")
def folder(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return annotated(shards_dir, tmp_path_factory.mktemp("annotated") / "shards")


def made(toml: Path, folder: Path, *words: str) -> RunConfig:
    return load(RunConfig, toml, [*WORDS, f"data.shards='{folder}'", *words])


def samples(cfg: RunConfig) -> TieredSamples:
    found = stage_stream(open_shards(cfg.data), cfg, cfg.stage[1])
    assert isinstance(found, TieredSamples)
    return found


@pytest.mark.parametrize(
    ("t", "shares"),
    [
        (0.0, (1.0, 0.0, 0.0)),
        (0.15, (0.75, 0.25, 0.0)),
        (0.3, (0.5, 0.5, 0.0)),
        (0.4, (0.375, 0.5, 0.125)),
        (0.5, (0.25, 0.5, 0.25)),
        (0.7, (0.0, 0.5, 0.5)),
        (0.85, (0.0, 0.25, 0.75)),
        (1.0, (0.0, 0.0, 1.0)),
    ],
)
def test_the_mix_is_linear_between_its_transitions(t: float, shares: tuple[float, ...]) -> None:
    assert EntropyCurriculum().mix(t) == pytest.approx(shares)
    moved = EntropyCurriculum(transitions=(0.2, 0.6))
    assert moved.mix(0.4) == pytest.approx((0.25, 0.5, 0.25))


def test_all_cuts_of_a_sample_are_of_one_tier_by_the_entropies_of_the_folder(
    toml: Path, folder: Path
) -> None:
    cfg = made(toml, folder)
    shards = ShardFolder.open(folder)
    known = {
        document.document_id: entropies(document, number)
        for name in shards.shard_files()
        for number, document in enumerate(shards.file(name))
    }
    stream = samples(cfg)
    for position in range(200):
        _, document = stream.at(position)
        value = known[document.document_id][document.cuts]
        assert document.cut_entropy is not None
        assert document.cut_entropy.tolist() == value.tolist()
        assert set(document.cut_kinds.tolist()) == {CUT_KINDS.index("annotated")}
        tiers = np.digitize(value, BOUNDS)
        assert len(set(tiers.tolist())) == 1
        assert tiers.min() >= 1
        cuts = [cut for _, _, cut in _keys(stream, position, cfg)]
        assert set(cuts) <= set(document.cuts.tolist())


def _keys(stream: TieredSamples, position: int, cfg: RunConfig) -> list[tuple[int, str, int]]:
    trunk = trunk_at(stream, position, cfg.prompts, cfg.seed)
    return [(trunk.epoch, trunk.document, trunk.start + cut) for cut in trunk.cuts]


def test_tiers_are_drawn_in_the_shares_of_the_step(toml: Path, folder: Path) -> None:
    cfg = made(toml, folder, "stage.1.steps=10", "stage.1.documents_per_step=600")
    stream = samples(cfg)
    for step, shares in ((0, (1, 0, 0)), (3, (0.5, 0.5, 0)), (5, (0.25, 0.5, 0.25))):
        positions = range(step * 600, (step + 1) * 600)
        drawn = Counter(stream.drawn(p, stream.samples.at(p)[1]) for p in positions)
        # 160 documents in 600 samples: a document draws once a step, so about 128 draws count.
        for tier, share in enumerate(shares):
            assert drawn[tier] / 600 == pytest.approx(share, abs=0.14)
            assert share or not drawn[tier]
    # What is asked for after the last step's samples is of the last step.
    last = [stream.drawn(p, stream.samples.at(p)[1]) for p in (5999, 5999 + 160_000)]
    assert 0 not in last


def test_documents_trained_twice_move_the_mix_at_the_pace_of_steps(
    toml: Path, folder: Path
) -> None:
    assert samples(made(toml, folder)).per_step == 4
    assert samples(made(toml, folder, "rollout.max_reuse=2")).per_step == 2


@pytest.mark.parametrize(
    ("entropy", "wanted", "tier", "kept"),
    [
        ((0.6, 1.2, 1.7, 0.9), 0, 0, (0, 3)),
        ((0.6, 1.2, 1.7, 1.0), 1, 1, (1, 3)),
        ((0.6, 1.2, 1.5, 0.9), 2, 2, (2,)),
        ((0.6, 0.7, 1.7, 0.9), 1, 0, (0, 1, 3)),
        ((1.6, 1.7, 1.7, 1.9), 0, 2, (0, 1, 2, 3)),
        ((0.5, 1.2, 1.1, 1.2), 2, 1, (1, 2, 3)),
    ],
    ids=["easy", "medium", "hard", "easier_of_two", "only_hard", "next_below"],
)
def test_a_missing_tier_falls_to_the_nearest_one(
    shards, entropy: tuple[float, ...], wanted: int, tier: int, kept: tuple[int, ...]
) -> None:
    document = replace(
        shards.split("train")[0],
        cuts=np.array([8, 9, 10, 11], np.uint32),
        cut_kinds=np.full(4, CUT_KINDS.index("annotated"), np.uint8),
        cut_entropy=np.array(entropy, np.float32),
    )
    found, chosen = nearest(document, np.ones(4, bool), EntropyCurriculum(tiers=BOUNDS), wanted)
    assert (found, tuple(np.flatnonzero(chosen).tolist())) == (tier, kept)
    # Cuts that leave no room for a context are no candidates.
    first = np.array([True, False, False, False])
    assert nearest(document, first, EntropyCurriculum(), wanted)[1].tolist() == first.tolist()


def test_positions_alone_say_the_cuts(toml: Path, folder: Path) -> None:
    cfg = made(toml, folder)
    forward, other = samples(cfg), samples(cfg)
    whole = [_keys(forward, p, cfg) for p in range(40)]
    assert [_keys(other, p, cfg) for p in reversed(range(40))] == whole[::-1]
    shared = [forward.take(0, 40, rank, 4) for rank in range(4)]
    for position in range(40):
        _, document = shared[position % 4][position // 4]
        assert document.cuts.tolist() == forward.at(position)[1].cuts.tolist()


def few(shards_dir: Path, path: Path) -> Path:
    """Shards of the first texts of the corpus, in the same tokenizer."""
    (path / "texts").mkdir(parents=True)
    for text in sorted((shards_dir.parent / "corpus").glob("*.txt"))[:40]:
        shutil.copy(text, path / "texts")
    table = {
        "out": str(path / "shards"),
        "without_decontamination": True,
        "source": {"kind": "folder", "path": str(path / "texts")},
        "tokenizer": {"kind": "file", "path": str(shards_dir / "tokenizer.json")},
    }
    prepare(parse(PrepareConfig, table, "test"), progress=False)
    return path / "shards"


def test_the_sources_of_a_mixture_move_together(
    toml: Path, folder: Path, shards_dir: Path, tmp_path: Path
) -> None:
    second = annotated(few(shards_dir, tmp_path), tmp_path / "annotated")
    parts = [("many", folder), ("few", second)]
    rows = [{"name": name, "shards": str(path), "weight": 1.0} for name, path in parts]
    cfg = made(toml, folder, "stage.1.steps=10", "stage.1.documents_per_step=64")
    data = {"mixture": rows, "cuts": cfg.data.cuts and cfg.data.cuts.model_dump(mode="json")}
    stream = samples(cfg.model_copy(update={"data": parse(DataConfig, data, "test")}))
    assert stream.shares(8) == {"mixture/many": 0.5, "mixture/few": 0.5}
    assert stream.period == stream.samples.period
    for step, shares in ((0, (1, 0, 0)), (5, (0.25, 0.5, 0.25))):
        # Turns alternate: even positions are of one source, odd ones of the other.
        for source in (0, 1):
            positions = range(step * 64 + source, (step + 1) * 64, 2)
            drawn = Counter(stream.drawn(p, stream.samples.at(p)[1]) for p in positions)
            assert [drawn[tier] / 32 for tier in range(3)] == pytest.approx(shares, abs=0.25)


def test_sums_are_the_tiers_of_the_samples_and_what_was_moved(toml: Path, folder: Path) -> None:
    stream = samples(made(toml, folder))
    positions = list(range(24))
    tiers, moved = Counter[str](), 0
    for position in positions:
        value = stream.at(position)[1].cut_entropy
        assert value is not None
        tier = int(np.digitize(value, BOUNDS)[0]) - 1
        tiers[TIERS[tier]] += 1
        moved += tier != stream.drawn(position, stream.samples.at(position)[1])
    assert moved
    assert stream.sums(positions) == {
        "curriculum/easy": (tiers["easy"], 24.0),
        "curriculum/medium": (tiers["medium"], 24.0),
        "curriculum/hard": (tiers["hard"], 24.0),
        "curriculum/moved": (moved, 24.0),
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["stage.1.curriculum={tiers=[1.0,0.5,1.5]}"], "give three increasing entropies"),
        (["stage.1.curriculum={transitions=[0.7,0.3]}"], "give two increasing parts of the stage"),
        (["stage.1.curriculum={transitions=[0.0,0.3]}"], "give two increasing parts of the stage"),
        (["data.cuts={min_entropy=1.0}"], "min_entropy = 1.0.*leaves stage rl a tier without cuts"),
        (["data.cuts={max_entropy=1.4}"], "max_entropy = 1.4.*leaves stage rl a tier without cuts"),
    ],
    ids=["tiers", "order", "zero", "no_easy", "no_hard"],
)
def test_a_curriculum_without_tiers_is_refused(
    toml: Path, folder: Path, words: list[str], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        samples(made(toml, folder, *words))


def test_shards_without_annotations_are_refused_before_any_model_loads(
    toml: Path, shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.load, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="annotate the shards with `rlpt data annotate`"):
        run(made(toml, shards_dir))


def _rows(run_dir: Path) -> list[dict]:
    rows = [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]
    clocks = ("time/", "engine/")
    return [{name: v for name, v in row.items() if not name.startswith(clocks)} for row in rows]


@pytest.mark.slow
def test_a_run_moves_from_easy_to_hard_and_resumes_exactly(
    runs, toml: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = made(toml, folder, "rollout.save_groups=true")
    run(cfg)
    whole = _rows(cfg.run_dir)
    assert len(whole) == 6
    for row in whole:
        assert sum(row[f"curriculum/{name}"] for name in TIERS) == pytest.approx(1.0)
    assert whole[0]["curriculum/hard"] <= whole[0]["curriculum/moved"]
    assert whole[0]["curriculum/easy"] > whole[-1]["curriculum/easy"]
    again = cfg.model_copy(update={"run_dir": toml.parent / "again"})
    runs.cut_off_and_resumed(again, 4, monkeypatch)
    assert json.dumps(_rows(again.run_dir)) == json.dumps(whole)
    _check_saved(made(toml, folder), toml)


def _check_saved(cfg: RunConfig, toml: Path) -> None:
    """Its groups train again with its curriculum, and with no other."""
    saved = cfg.rollout.model_copy(update={"source": "saved", "saved": cfg.run_dir})
    cfg = cfg.model_copy(update={"rollout": saved, "run_dir": toml.parent / "saved"})
    stages = (cfg.stage[0], cfg.stage[1].model_copy(update={"curriculum": None}))
    with pytest.raises(UserError, match="its curriculum gave other cuts"):
        run(cfg.model_copy(update={"stage": stages}))
    run(cfg)
    assert len(_rows(cfg.run_dir)) == 6
