"""Paragraphs are asked for spans, spans become prompts, and both tasks of a document stay together."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist
from rlpt.batch import Wanted, document_cost, documents, rollout_batch
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig, ThoughtConfig
from rlpt.credit import Credit
from rlpt.engines import RolloutConfig
from rlpt.masker import Masker, MaskerSupply
from rlpt.optim import adamw
from rlpt.policy import load
from rlpt.policy.markers import Vocabulary
from rlpt.prompts import Samples
from rlpt.reward.base import Kit
from rlpt.reward.masker import MaskerConfig, Placing
from rlpt.reward.match import MatchReward
from rlpt.rl_update import _Update, rl_step
from rlpt.rollout import sync
from rlpt.rollout.transformers_engine import TransformersEngine
from rlpt.stages import OptimizerConfig, RLStage
from rlpt.terms import ObjectiveConfig
from rlpt.types import Frame, Group, Markers, Prompt, Rollout
from rlpt.update import Learner
from rlpt_data.shards import Document
from rlpt_data.strict import UserError

LETTERS = "abcdefghijkl"
MARKERS = Markers(12, 13, Frame(head=(0, 1), tail=(2,)))
ASKING = Frame(head=(3,), tail=(4, 5))
TEXT = [*(letter.encode() for letter in LETTERS), b"", b""]
PROMPTS = PromptConfig(
    context_tokens=8, min_context_tokens=4, horizon_tokens=2, segment="middle", after_tokens=2
)
ALONE = dist.World(0, 1, torch.device("cpu"))


class Written(Samples):
    """Documents as they are given, over and over; each has one cut, two tokens before its end."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    @property
    def period(self) -> int:
        return len(self.texts)

    def at(self, position: int) -> tuple[int, Document]:
        epoch, index = divmod(position, len(self.texts))
        ids = np.array([LETTERS.index(letter) for letter in self.texts[index]], dtype=np.uint32)
        return epoch, Document(
            document_id=str(index),
            url=None,
            domain="",
            text="",
            ids=ids,
            offsets=np.arange(len(ids) + 1, dtype=np.uint32),
            cuts=np.array([len(ids) - 2], dtype=np.uint32),
            cut_kinds=np.array([0], dtype=np.uint8),
        )


class Scripted:
    """An engine whose rollouts say what a function of the prompt and the rollout's number says."""

    dtype = "float32"
    is_reference = True
    version = 0

    def __init__(self, says: Callable[[Prompt, int], str]) -> None:
        self.says = says
        self.asked: dict[str, tuple[Prompt, int, str, int | None]] = {}
        self.names = itertools.count()
        self.purposes: list[str] = []

    def submit(
        self, prompts: Sequence[Prompt], group_size: int, purpose: str, budget: int | None = None
    ) -> list[str]:
        tickets = [str(next(self.names)) for _ in prompts]
        self.asked |= {
            ticket: (prompt, group_size, purpose, budget)
            for ticket, prompt in zip(tickets, prompts, strict=True)
        }
        self.purposes += [purpose] * len(prompts)
        return tickets

    def collect(self, tickets: Sequence[str]) -> list[Group]:
        jobs = [self.asked.pop(ticket) for ticket in tickets]
        return [
            Group(prompt, tuple(rollout(self.says(prompt, g)) for g in range(size)), budget)
            for prompt, size, _, budget in jobs
        ]

    def cancel(self, tickets: Sequence[str]) -> None: ...

    def publish(self, named_tensors, version: int) -> None: ...

    def rest(self) -> None: ...

    def counters(self) -> dict:
        return {}

    def close(self) -> None: ...


def rollout(said: str) -> Rollout:
    """A thought, its closer and a prediction."""
    ids = np.array([0, MARKERS.closer, *(LETTERS.index(letter) for letter in said)])
    ones = np.ones(len(ids))
    return Rollout(ids, ones > 0, -ones.astype(np.float32), 0 * ids, 1, "closer")


def stage(documents_per_step: int = 2, **changes) -> RLStage:
    sizes = {"steps": 9, "documents_per_step": documents_per_step, "group_size": 4}
    own = {"reward": MatchReward(kind="match", how="span"), "masker": ask()}
    return RLStage.model_validate({"name": "rl", "kind": "rl"} | sizes | own | changes)


def ask(**changes) -> MaskerConfig:
    return MaskerConfig(**({"instruction": "mask:", "max_tokens": 3} | changes))


def supply_of(
    engine, texts: Sequence[str], own: RLStage, markers: Markers = MARKERS, asking=ASKING
):
    assert own.masker is not None
    masker = Masker(
        Placing(own.masker, markers.closer, lambda: TEXT),
        PROMPTS.model_copy(update={"segment": "next"}),
        asking,
        markers,
    )
    parts = (engine, Written(texts), PROMPTS, RolloutConfig(), own, markers, 0, 20, ALONE)
    return MaskerSupply(masker, *parts)


def says(prompt: Prompt, g: int) -> str:
    """Document 0, "cdefghij" behind two letters: proposals de, fgh, de and lk; de is right once, fgh always.
    Document 1, "ghijk": h, hi, h and ig; h is never right, hi twice."""
    if not prompt.horizon:
        return (("de", "fgh", "de", "lk"), ("h", "hi", "h", "ig"))[int(prompt.trunk.document)][g]
    gold = "".join(LETTERS[int(index)] for index in prompt.continuation_ids)
    right = {"de": 1, "fgh": 4, "h": 0, "hi": 2}[gold]
    return gold if g < right else "l"


TEXTS = ["abcdefghijkl", "ghijkla"]


def batch_of(own: RLStage):
    engine = Scripted(says)
    supply = supply_of(engine, TEXTS, own)
    batch = supply.take(0, own.steps)
    assert not engine.asked
    assert supply.rows() == []
    return batch, engine


def test_a_paragraph_is_the_text_before_its_cut_asked_in_a_frame_of_its_own() -> None:
    batch, _ = batch_of(stage())
    first, second = (batch.groups[places[0]].prompt for places in batch.places.values())
    assert first.policy_ids.tolist() == [3, *range(2, 10), 4, 5, MARKERS.opener]
    assert first.key == (0, "0", 10)
    assert second.policy_ids.tolist() == [3, *range(6, 11), 4, 5, MARKERS.opener]
    assert len(first.continuation_ids) == len(second.continuation_ids) == 0


def test_a_mask_reads_what_follows_it_then_what_precedes_it_in_the_paragraph_alone() -> None:
    batch, engine = batch_of(stage())
    masks = [group.prompt for group in batch.groups if group.prompt.horizon]
    seen = {tuple(mask.continuation_ids): mask for mask in masks}
    assert sorted(seen) == [(3, 4), (5, 6, 7), (7,), (7, 8)]
    assert seen[3, 4].policy_ids.tolist() == [0, 1, *range(5, 10), 2, 2, MARKERS.opener]
    assert seen[3, 4].key == (0, "0", 3)
    assert seen[3, 4].continuation_bytes == 2
    assert seen[3, 4].trunk.num_bytes(0, 10) == 8
    assert seen[7, 8].policy_ids.tolist() == [0, 1, 9, 10, 6, 2, MARKERS.opener]
    # One key and two prompts: their purposes tell their draws apart.
    assert seen[7,].key == seen[7, 8].key == (0, "1", 1)
    assert [engine.purposes.count(f"rollout/rl/mask_{n}") for n in (1, 2, 3)] == [1, 2, 1]
    assert engine.purposes.count("rollout/rl") == 2


def test_equal_proposals_share_one_mask_and_its_predictions() -> None:
    batch, _ = batch_of(stage())
    assert batch.positions == [0, 1]
    assert {at: len(places) for at, places in batch.places.items()} == {0: 3, 1: 3}
    assert [lot.position for lot in batch.lots] == batch.positions
    for lot in batch.lots:
        assert [group.prompt for group in lot.groups or ()] == lot.prompts


def test_both_tasks_of_a_step_are_rewarded_as_by_hand() -> None:
    own = stage()
    batch, _ = batch_of(own)
    reward = own.built(Kit({}, MARKERS, centred=True, token_bytes=lambda: TEXT))
    rewarded = reward(batch.groups)
    found = {
        (group.prompt.trunk.document, tuple(group.prompt.continuation_ids)): row
        for group, row in zip(batch.groups, rewarded.reward_PG.tolist(), strict=True)
    }
    assert found == {
        ("0", ()): [0.75, 0.0, 0.75, 0.0],
        ("0", (3, 4)): [1.0, 0.0, 0.0, 0.0],
        ("0", (5, 6, 7)): [1.0, 1.0, 1.0, 1.0],
        ("1", ()): [0.0, 0.5, 0.0, 0.0],
        ("1", (7,)): [0.0, 0.0, 0.0, 0.0],
        ("1", (7, 8)): [1.0, 1.0, 0.0, 0.0],
    }
    assert rewarded.sums["masker/absent"] == (2.0, 8.0)
    assert rewarded.sums["masker/masks"] == (4.0, 2.0)
    # Each group is compared with its own siblings: paragraph 0's mean is 3/8.
    advantage_PG = Credit(own, ALONE, 0, 0).advantages(rewarded.reward_PG)
    assert advantage_PG[0] == pytest.approx(np.array([0.375, -0.375, 0.375, -0.375]) * 4 / 3)


def test_rewards_come_in_one_call_and_micro_batches_are_whole_documents(policy) -> None:
    own = stage(micro_batch_tokens=1)
    batch, _ = batch_of(own)
    assert own.why_separate(whole=True) is not None
    assert documents(batch.groups) == [list(places) for places in batch.places.values()]
    learner = Learner(policy, adamw(policy, own.optimizer), None, MARKERS, ALONE, 0)
    update = _Update(learner, batch.groups, own, Credit(own, ALONE, 0, 0), 0)
    assert sorted(map(sorted, update.parts(continuations=False))) == documents(batch.groups)
    wanted = Wanted(continuations=False, text=False)
    for places in batch.places.values():
        groups = [batch.groups[p] for p in places]
        for layout in ("shared", "naive"):
            packed = rollout_batch(groups, MARKERS, ALONE.device, layout, wanted, 0).packed
            assert document_cost(groups, wanted, layout) == packed.num_tokens


def test_a_paragraph_whose_proposals_are_all_refused_is_trained_alone() -> None:
    engine = Scripted(lambda _prompt, _g: "la")
    batch = supply_of(engine, TEXTS, stage()).take(0, 9)
    assert [len(lot.groups or ()) for lot in batch.lots] == [1, 1]


def test_thoughts_of_another_configuration_are_refused() -> None:
    supply = supply_of(Scripted(says), TEXTS, stage())
    supply.restore([], 4, "there")
    assert supply.next == 4
    row = {
        "place": "waiting",
        "position": 4,
        "uses": 0,
        "budget": None,
        "cuts": [8],
        "groups": None,
    }
    with pytest.raises(UserError, match="there: holds thoughts of a stage without"):
        supply.restore([row], 4, "there")


def test_proposals_move_away_from_what_is_refused(world: dist.World) -> None:
    """A policy that knows nothing, of twelve letters, of which four are ever written: what it proposes becomes text of
    its paragraph, and then what it predicts becomes right."""
    markers = Markers(12, 13)
    config = transformers.LlamaConfig(
        vocab_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.1, pad_token_id=None, bos_token_id=None, eos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    plan = load.Blueprint(config, Vocabulary(markers, 12, 14), {}, "shared", "")
    policy = load.load(PolicyConfig(fresh=FreshPolicy(init_std=0.1)), plan, world, seed=0)
    thought = ThoughtConfig(budget_tokens=1, prediction_tokens=1)
    engine = TransformersEngine(config, "shared", markers, thought, 0, 64, world.device)
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcd"), 8)) + "aa" for _ in range(64)]
    own = stage(
        4, steps=16, group_size=6, masker=ask(max_tokens=1),
        objective=ObjectiveConfig(mask="clip"), optimizer=OptimizerConfig(lr=3e-3),
    )  # fmt: skip
    supply = supply_of(engine, texts, own, markers, Frame(tail=(11,)))
    reward = own.built(Kit({}, markers, centred=True, token_bytes=lambda: TEXT))
    learner = Learner(policy, adamw(policy, own.optimizer), None, markers, world, seed=0)
    found: dict[str, list[float]] = {"masker/accepted": [], "reward/match": []}
    for step in range(own.steps):
        sync.publish(policy, engine, step)
        batch = supply.take(step, own.steps - step)
        sums = rl_step(learner, batch.groups, reward, own, step, step).sums
        for name, values in found.items():
            values.append(sums[name][0] / sums[name][1])
    for values in found.values():
        assert np.mean(values[-5:]) > np.mean(values[:3]) + 0.25
