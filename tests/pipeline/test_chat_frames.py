"""Chat frames: template ids around page text that is spliced in as it is, and scored there."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from rlpt import dist
from rlpt.batch import Wanted, document_cost, padded_costs, rollout_batch, text_positions
from rlpt.config import FreshPolicy, PolicyConfig, PromptConfig
from rlpt.evaluate.continuation import _opener_masses
from rlpt.evaluate.controls import context_copy
from rlpt.policy import load
from rlpt.policy.chat import frame_of
from rlpt.policy.scoring import Scorer
from rlpt.policy.selfcheck import LARGEST_ERROR, check_layout
from rlpt.prompts import held_out, prompt_stream, prompts_of, trunk
from rlpt.reward.base import Kit, bare_scores
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.reward.match import answer
from rlpt.templates import TEMPLATES, ChatFrame
from rlpt.types import Group, Prompt, Rollout, bare_branch, concat, thought_branch
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError, parse

CHAT = {
    "kind": "chat", "template": "chatml", "system": "You know the river.", "instruction": "Go on:",
    "prefill": "Well,", "bridge": "\n\nIt says: ",
}  # fmt: skip
SPLIT = {"context_tokens": 24, "min_context_tokens": 6, "horizon_tokens": 5}


FRESH = FreshPolicy(layers=2, width=32, heads=2, mlp_width=64, init_std=0.1)


def config(**more: object) -> PromptConfig:
    return parse(PromptConfig, SPLIT | {"frame": CHAT | more}, "prompts")


def plan_of(shards: ShardFolder, cfg: PromptConfig) -> load.Blueprint:
    return load.blueprint(PolicyConfig(fresh=FRESH), shards, 300, cfg.frame)


@pytest.fixture(scope="module")
def chat(chat_shards: ShardFolder) -> load.Blueprint:
    return plan_of(chat_shards, config())


@pytest.fixture(scope="module")
def policy(chat: load.Blueprint, world: dist.World):
    return load.load(PolicyConfig(fresh=FRESH), chat, world, seed=0)


@pytest.fixture(scope="module")
def prompts(chat_shards: ShardFolder, chat: load.Blueprint) -> list[Prompt]:
    return held_out(chat_shards.split("train"), config(), chat.vocabulary.markers, 6, 0, ())


def whole_encoding(shards: ShardFolder, text: str) -> tuple[int, ...]:
    """Of a string in which special tokens are spelt, as a chat server would encode it."""
    return tuple(tokenizers.Tokenizer.from_file(str(shards.tokenizer_path)).encode(text).ids)


@pytest.mark.parametrize(
    ("template", "head", "tail"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGo on.\n\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nGo on.\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\nGo on.\n\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("plain", "Be brief.\n\nText:\nGo on.\n\n", "\n\nAnswer:\n"),
    ],
    ids=["chatml", "llama3", "gemma", "plain"],
)
def test_a_frame_has_the_ids_of_the_templates_own_string(
    template: str, head: str, tail: str, chat_shards: ShardFolder
) -> None:
    system = "" if template == "gemma" else "Be brief."
    more = {"template": template, "system": system, "instruction": "Go on.", "answer_open": "<a>"}
    cfg = config(**more, answer_close="</a>")
    frame = plan_of(chat_shards, cfg).vocabulary.markers.frame
    assert frame.head == whole_encoding(chat_shards, head)
    assert frame.tail == whole_encoding(chat_shards, tail)
    assert frame.bridge == whole_encoding(chat_shards, "\n\nIt says: <a>")
    assert frame.answer == (b"<a>", b"</a>")
    prefill = whole_encoding(chat_shards, "Well,")
    assert (frame.lead, frame.prefill) == ((prefill, ()) if template == "plain" else ((), prefill))


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_page_text_is_the_shards_ids_and_keeps_its_place(
    template: str, chat_shards: ShardFolder
) -> None:
    cfg = config(template=template).model_copy(update={"cuts_per_document": 3})
    markers = plan_of(chat_shards, cfg).vocabulary.markers
    frame, split = markers.frame, chat_shards.split("train")
    documents = {document.document_id: document for document in split}
    stream = prompt_stream(split, cfg, 0, "rl")
    for epoch, document in map(stream.at, range(20)):
        made = trunk(document, epoch, cfg, 0)
        plain = prompts_of(made, cfg, replace(markers, frame=type(frame)()))
        for prompt, bare in zip(prompts_of(made, cfg, markers), plain, strict=True):
            assert prompt.key == bare.key
            cut, text = prompt.key[2], documents[prompt.trunk.document].ids
            page = text[cut - len(bare.policy_ids) + 1 : cut]
            assert prompt.continuation_ids.tolist() == text[cut : cut + 5].tolist()
            assert prompt.context_ids.tolist() == page.tolist()
            assert prompt.continuation_bytes == bare.continuation_bytes
            read = concat(
                *(frame.head, page, frame.tail, frame.lead, [markers.opener], frame.prefill)
            )
            assert prompt.policy_ids.tolist() == prompt.score_ids.tolist() == read.tolist()


def plain_logp(policy, prefix: np.ndarray, target: np.ndarray, banned: tuple[int, ...] = ()):
    """Of every target token under an ordinary transformers model, one sequence, float64 softmax."""
    lm = transformers.AutoModelForCausalLM.from_config(policy.lm.config, dtype=torch.float32).eval()
    lm.load_state_dict(dict(load.named_full_tensors(policy)), strict=False)
    with torch.no_grad():
        logits = lm(torch.from_numpy(concat(prefix, target))[None]).logits[0].double()
    logits[:, list(banned)] = -torch.inf
    logp = torch.log_softmax(logits, -1)[len(prefix) - 1 : -1]
    return logp[torch.arange(len(target)), torch.from_numpy(target)].numpy()


def test_held_out_text_is_scored_as_transformers_scores_the_spliced_ids(
    policy, chat: load.Blueprint, prompts: list[Prompt], world: dist.World
) -> None:
    """With a thought and without, to 1e-5, each after its bridge."""
    markers, frame = chat.vocabulary.markers, chat.vocabulary.markers.frame
    scorer = Scorer(policy, markers.ids, world, tokens=400)
    thoughts = [np.arange(n % 4) + 3 for n in range(len(prompts))]
    own = scorer.branches(
        [(p.trunk, thought_branch(p, markers, z)) for p, z in zip(prompts, thoughts, strict=True)]
    )
    bare = bare_scores(scorer, prompts)
    for prompt, thought, with_it, without in zip(prompts, thoughts, own, bare, strict=True):
        start = concat(frame.head, prompt.context_ids, frame.tail)
        said = ([markers.opener], frame.prefill, thought, [markers.closer])
        for found, between in ((with_it, concat(*said)), (without, concat())):
            prefix, gold = concat(start, between, frame.bridge), prompt.continuation_ids
            expected = plain_logp(policy, prefix, gold, markers.ids)
            assert np.allclose(found.logp, expected, atol=1e-5, rtol=0)


def test_the_shared_layout_stays_exact_inside_a_frame(
    policy, chat: load.Blueprint, prompts: list[Prompt], world: dist.World
) -> None:
    error = check_layout(policy, prompts, chat.vocabulary.markers, 8, world)
    assert error <= LARGEST_ERROR / 10


def test_opener_mass_and_hidden_context_are_those_of_the_frame(
    policy, chat: load.Blueprint, prompts: list[Prompt], world: dist.World
) -> None:
    """p(opener | head, page, tail), nothing banned; and held-out text after a chat without any page."""
    markers, frame = chat.vocabulary.markers, chat.vocabulary.markers.frame
    unbanned, scorer = (Scorer(policy, banned, world, tokens=400) for banned in ((), markers.ids))
    masses = _opener_masses(unbanned, prompts, markers)
    kit = Kit({"policy": scorer}, markers, True)
    cfg = parse(LikelihoodReward, {"context": "hidden", "baseline": "none"}, "reward")
    (group, *_) = groups_of(prompts, markers)
    found = cfg.build(kit)([group]).reward_PG[0]
    for prompt, mass in zip(prompts, masses, strict=True):
        before = concat(frame.head, prompt.context_ids, frame.tail)
        (expected,) = plain_logp(policy, before, np.array([markers.opener]))
        assert mass == pytest.approx(np.exp(expected), rel=1e-5)
    opened = concat(frame.tail, [markers.opener], frame.prefill)
    for value, rollout in zip(found, group.rollouts, strict=True):
        before = concat(frame.head, opened, rollout.ids, frame.bridge)
        expected = plain_logp(policy, before, group.prompt.continuation_ids, markers.ids)
        assert value == pytest.approx(expected.mean(), abs=1e-5)


def groups_of(prompts: list[Prompt], markers) -> list[Group]:
    ids = [np.array([7 + n, 9, markers.closer]) for n in range(2)]
    made = [
        Rollout(i, np.ones(3, bool), np.zeros(3, np.float32), np.zeros(3, int), 2, "closer")
        for i in ids
    ]
    return [Group(prompt, tuple(made)) for prompt in prompts]


@pytest.mark.parametrize("layout", ["shared", "naive"])
def test_the_cost_of_a_document_in_a_frame_is_what_is_packed(
    layout, chat: load.Blueprint, chat_shards: ShardFolder
) -> None:
    markers = chat.vocabulary.markers
    cfg = config().model_copy(update={"cuts_per_document": 3})
    stream = prompt_stream(chat_shards.split("train"), cfg, 0, "rl")
    made = trunk(stream.at(0)[1], 0, cfg, 0)
    groups = groups_of(prompts_of(made, cfg, markers), markers)
    wanted = Wanted(continuations=True, text=True)
    batch = rollout_batch(groups, markers, torch.device("cpu"), layout, wanted, 0)
    if layout == "shared":
        assert batch.packed.num_tokens == document_cost(groups, wanted, layout)
    else:
        assert batch.packed.ids_NT.numel() == sum(padded_costs([groups], wanted, layout))
    positions = text_positions(groups, wanted)
    assert [len(at) for _, at in positions] == [len(made.ids)]
    assert positions[0][1][0] == len(markers.frame.head)


def test_a_copy_of_the_context_is_page_text_alone(
    chat: load.Blueprint, prompts: list[Prompt]
) -> None:
    special = set(chat.vocabulary.markers.frame.head) - set(range(320))
    assert special
    for n, prompt in enumerate(prompts):
        copy = context_copy(prompt, 60, np.random.default_rng(n))
        assert set(copy.tolist()) == set(prompt.context_ids.tolist())


def test_the_longest_path_leaves_room_for_every_frame(chat_shards: ShardFolder) -> None:
    for template in TEMPLATES:
        cfg = config(template=template, system="" if template == "gemma" else "Ürlaub 日本")
        frame = plan_of(chat_shards, cfg).vocabulary.markers.frame
        assert len(frame.head) <= cfg.frame.most_before
        after = len(frame.tail) + len(frame.lead) + len(frame.prefill) + len(frame.bridge)
        assert after <= cfg.frame.most_after


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (b"so <a>one</a>", b"one"),
        (b"<a>one</a> no, <a> two</a>!", b" two"),
        (b"<a>one</a> or <a>tw", b"one"),
        (b"<a>one</a> </a>", b"one"),
        (b"<a><a>one</a>", b"one"),
        (b"<a></a>", b""),
        (b"</a>one<a>", b""),
        (b"one</a>", b""),
        (b"<a>one", b""),
        (b"one", b""),
    ],
    ids=range(10),
)
def test_the_last_whole_pair_is_the_answer(said: bytes, found: bytes) -> None:
    assert answer(said, b"<a>", b"</a>") == found


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"template": "chatlm"}, "template = 'chatlm' is unknown; known are chatml, llama3"),
        ({"template": "gemma"}, "no system turn; put the text into `instruction`"),
        ({"answer_open": "<a>"}, "answer_open and answer_close go together"),
        ({"instruction": "Think in <think> tags."}, "frame.instruction: contains '<think>'"),
        ({"prefill": "</think>"}, "frame.prefill: contains '</think>'"),
        ({"system": "a<|im_end|>b"}, "system: contains '<|im_end|>', which only the template"),
    ],
    ids=["unknown", "system", "marks", "opener", "closer", "special"],
)
def test_a_frame_that_makes_no_sense_is_refused(
    more: dict, line: str, chat_shards: ShardFolder
) -> None:
    with pytest.raises(UserError) as refused:
        plan_of(chat_shards, config(**more))
    assert line in str(refused.value)


def test_a_tokenizer_without_the_special_tokens_is_refused(shards: ShardFolder) -> None:
    with pytest.raises(UserError, match=r"no special token '<\|im_start\|>'; its tokens fit plain"):
        plan_of(shards, config())
    frame = ChatFrame(kind="chat", template="plain")
    tokenizer = json.loads(shards.tokenizer_path.read_text())
    assert frame_of(frame, PolicyConfig(fresh=FRESH), shards, tokenizer).head


def test_a_bare_branch_in_a_frame_is_scored_behind_its_bridge(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        branch, frame = bare_branch(prompt), prompt.frame
        assert branch.score_start == len(frame.tail) + len(frame.bridge)
        assert branch.ids[branch.score_start :].tolist() == prompt.continuation_ids.tolist()
