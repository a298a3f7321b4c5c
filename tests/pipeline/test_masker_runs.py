"""A masker in whole runs: what it logs, cut off and taken up, on two ranks; what it cannot go together with."""

from pathlib import Path

import pytest
import torch

from rlpt.config import PolicyConfig, PromptConfig, RunConfig
from rlpt.flops import documents, step_cost
from rlpt.masker import masker_of
from rlpt.policy import load as loading
from rlpt.prompts import prompt_stream, trunk_at
from rlpt.reward.masker import REASONS
from rlpt.rollout.records import unpacked
from rlpt.runlog import read_journal
from rlpt.templates import TEMPLATES, ChatFrame
from rlpt.train import run
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, load

WORDS = [
    "stage.0.steps=20", "stage.0.optimizer={lr=1e-2}", "stage.0.mix={plain=0.5, copied=0.5}",
    "stage.1.steps=4", "stage.1.documents_per_step=4", "stage.1.group_size=4",
    "stage.1.reward={kind='match', how='span'}", "stage.1.masker={instruction='mask:', max_tokens=2}",
    "stage.1.objective={mask='clip', aggregate='token'}", "stage.1.advantage={baseline='group_mean'}",
    "stage.1.optimizer={lr=3e-3, eps=1e-4}",
    "prompts.cuts_per_document=1", "prompts.segment='middle'", "prompts.after_tokens=8",
    "thought.prediction_tokens=2", "evaluation.prompts=8", "evaluation.controls=['filler']",
]  # fmt: skip


def rows_of(run_dir: Path) -> list[dict]:
    rows = [row for row in read_journal(run_dir / "metrics.jsonl") if row["stage"] == "rl"]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "engine/"))} for row in rows
    ]


@pytest.fixture(scope="module")
def accounted(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory, beside) -> Path:
    """The folder of a run with checkpoints."""
    folder = tmp_path_factory.mktemp("masked")
    toml = beside("conftest").write_run(folder, shards_dir)
    run(load(RunConfig, toml, [*WORDS, "checkpoint.every=2"]))
    return folder / "run"


def test_every_position_is_trained_once_and_every_proposal_is_accounted_for(
    accounted: Path,
) -> None:
    rows = rows_of(accounted)
    assert len(rows) == 4
    for row in rows:
        parts = [row["masker/accepted"], *(row[f"masker/{reason}"] for reason in REASONS)]
        assert sum(parts) == pytest.approx(1.0)
        assert row["masker/masks"] <= 4 * row["masker/accepted"] + 1e-9
        assert row["staleness/dropped_groups"] == 0.0
    assert sum(row["masker/masks"] for row in rows) > 0
    for row in rows:
        path = accounted / "rollouts" / f"step_{row['step']:06d}.jsonl.zst"
        dump = unpacked(path.read_bytes(), "dump")
        assert dump
        masked = [each for each in dump if each["continuation_tokens"]]
        assert len(dump) - len(masked) <= 4
        for each in masked:
            said = "".join(each["continuation_tokens"]).strip()
            for rollout in each["rollouts"]:
                assert rollout["reward"] == float(rollout["prediction"].strip() == said)


def test_a_stage_that_is_cut_off_goes_on_exactly(
    runs, accounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"run_dir='{tmp_path / 'again'}'", *WORDS, "checkpoint.every=2"]
    toml = accounted.parent / "run.toml"
    runs.cut_off_and_resumed(load(RunConfig, toml, words), 22, monkeypatch)
    assert rows_of(tmp_path / "again") == rows_of(accounted)


@pytest.mark.slow
def test_two_ranks_train_the_masks_and_the_weights_of_one(
    runs, toml: Path, shards_dir: Path, tmp_path: Path
) -> None:
    """Ranks have different numbers of masks, and micro-batches of whole documents as many on each."""
    found = []
    for ranks in (1, 2):
        own = f"run_dir={tmp_path / str(ranks)}"
        words = [*WORDS, own, "stage.1.micro_batch_tokens=300", "checkpoint.every=4"]
        runs.finished(toml, *(w for word in words for w in ("--set", word)), ranks=ranks)
        found.append((rows_of(tmp_path / str(ranks)), runs.weights_of(tmp_path / str(ranks), 24)))
    (ours, one), (theirs, two) = found
    assert sum(row["masker/masks"] for row in ours) > 0
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine.keys() - {"stage", "tokens/train"}:
            assert other[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-5), key
    for key, tensor in one.items():
        error = torch.linalg.vector_norm(two[key] - tensor)
        assert error <= 1e-5 * torch.linalg.vector_norm(tensor), key


REFUSED = {
    "reward": ("stage.1.reward={kind='match'}", "set reward = { kind = 'match', how = 'span' }"),
    "likelihood": ("stage.1.reward={kind='likelihood'}", "set reward = { kind = 'match', how = 'span' }"),
    "sampling": ("stage.1.sampling={kind='dynamic'}", "leave out sampling, difficulty and curriculum"),
    "difficulty": ("stage.1.difficulty={low=0.1,high=0.9}", "leave out sampling, difficulty and curriculum"),
    "curriculum": ("stage.1.curriculum={}", "leave out sampling, difficulty and curriculum"),
    "siblings": ("stage.1.group_size=1 stage.1.advantage={baseline='none'}", "set group_size >= 2"),
    "text": ("stage.1.objective.next_token_weight=0.1", "set objective.next_token_weight = 0"),
    "segment": ("prompts.segment='next'", "set prompts.segment = 'middle'"),
    "share": ("prompts.middle_share=0.5", "leave out prompts.middle_share"),
    "annotated": ("data.cuts={proxy='a',top_share=0.2}", "leave out [data.cuts]"),
    "reuse": ("rollout.max_reuse=2", "leave out [rollout]"),
    "groups": ("rollout.save_groups=true", "leave out [rollout]"),
    "long": ("stage.1.masker.max_tokens=3", "max_tokens = 3 exceeds thought.prediction_tokens"),
    "room": ("stage.1.masker.edge_tokens=4", "min_tokens + 2 edge_tokens = 9 exceed prompts.min_context_tokens"),
    "special": ("stage.1.masker.instruction='<think>'", "masker.instruction: contains '<think>'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_masker_cannot_go_with_is_refused_in_one_line(name: str, toml: Path) -> None:
    change, remedy = REFUSED[name]
    with pytest.raises(UserError) as caught:
        run(load(RunConfig, toml, [*WORDS, *change.split()]), dry_run=True)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_proposal_is_asked_for_by_words_inline_and_by_the_instruction_of_a_chat(
    chat_shards: ShardFolder, toml: Path
) -> None:
    base = load(RunConfig, toml, WORDS)
    stage = base.stage[1]
    assert stage.kind == "rl"
    assert stage.masker is not None
    masker = stage.masker.model_copy(update={"instruction": "Copy a span."})
    frames = [base.prompts.frame]
    frames += [
        ChatFrame(kind="chat", template=name, instruction="Fill it in:") for name in TEMPLATES
    ]
    for frame in frames:
        prompts: PromptConfig = base.prompts.model_copy(update={"frame": frame})
        own = stage.model_copy(update={"masker": masker})
        cfg = base.model_copy(update={"prompts": prompts, "stage": (own,)})
        plan = loading.blueprint(PolicyConfig(fresh=base.policy.fresh), chat_shards, 400, frame)
        made = masker_of(cfg, masker, chat_shards, plan)
        stream = prompt_stream(chat_shards.split("train"), prompts, 0, "rl")
        prompt = made.proposal(trunk_at(stream, 0, made.prompts, 0))
        ids = prompt.policy_ids.tolist()
        tail = chat_shards.encode("Copy a span.").tolist()
        if frame.kind == "inline":
            expected = [*prompt.context_ids.tolist(), *tail, plan.vocabulary.markers.opener]
            assert ids == expected
        else:
            text = b"".join(plan.token_bytes(chat_shards)[i] for i in ids)
            assert b"Copy a span.\n\n" in text
            assert b"Fill it in:" not in text
        longest = cfg.longest_branch - cfg.thought.budget_tokens - cfg.thought.prediction_tokens - 1
        assert len(ids) <= longest
        shape = documents(cfg, own)
        assert (shape.trunks, shape.branches) == (5, 20)
        assert len(ids) <= shape.context + shape.frame + 1
        alone = own.model_copy(update={"masker": None, "documents_per_step": 20})
        # A paragraph and four masks cost no more than five documents do.
        costs = [
            step_cost(cfg, each, plan.config, "shared").sampled_tokens for each in (own, alone)
        ]
        assert costs[0] == costs[1]


def test_a_special_token_is_named_by_its_own_key_in_a_chat(
    chat_shards: ShardFolder, toml: Path
) -> None:
    frame = ChatFrame(kind="chat", template="chatml")
    base = load(RunConfig, toml, [*WORDS, "stage.1.masker.instruction='<|im_end|>'"])
    (masker,) = (stage.masker for stage in base.stage if stage.kind == "rl")
    assert masker is not None
    prompts = base.prompts.model_copy(update={"frame": frame})
    plan = loading.blueprint(PolicyConfig(fresh=base.policy.fresh), chat_shards, 400, frame)
    with pytest.raises(UserError, match=r"^masker\.instruction: contains '<\|im_end\|>'"):
        masker_of(base.model_copy(update={"prompts": prompts}), masker, chat_shards, plan)
