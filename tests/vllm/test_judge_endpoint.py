"""The judge's protocol against a real OpenAI server: vLLM's own, with a model that was made to say one thing."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from rlpt.policy.markers import with_markers
from rlpt.prompts import held_out
from rlpt.reward.base import Kit, Rewarded
from rlpt.reward.endpoint import UnansweredError
from rlpt.reward.judge import Judge, JudgeReward, question
from rlpt.rollout import sync
from rlpt.rollout.engine import generate
from rlpt_data.strict import parse

SAID = "Score: 1"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}\n>"
TOKEN = "s3cret"


def one_sentence(folder: Path, bench) -> None:
    """A Llama whose layers add nothing: after the template's last token it says SAID and ends, whatever was asked."""
    tokenizer = with_markers(bench.plan.tokenizer, bench.cfg.policy, bench.markers)
    read = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    chain = [read.encode("x\n>").ids[-1], *read.encode(SAID).ids, bench.markers.closer]
    assert len(set(chain)) == len(chain), "every token must say what the next one is"
    width = 512
    config = transformers.LlamaConfig(
        vocab_size=bench.plan.vocabulary.size, hidden_size=width, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=8, max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=bench.markers.closer, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    assert config.vocab_size <= width
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size, width))
        model.lm_head.weight.zero_()
        for before, after in pairwise(chain):
            model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def started(folder: Path, port: int) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "one-sentence", "--api-key", TOKEN, "--port", str(port)),
        *(
            "--host",
            "127.0.0.1",
            "--dtype",
            "float32",
            "--max-model-len",
            "4096",
            "--enforce-eager",
        ),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder.parent / "server.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


@pytest.fixture(scope="module")
def address(shared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("judge") / "model"
    one_sentence(folder, shared[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = started(folder, port)
    try:
        until_ready(f"http://127.0.0.1:{port}/health", process, folder.parent / "server.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def until_ready(health: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(health, timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def judge(shared, address: str, monkeypatch: pytest.MonkeyPatch):
    """`judge(**keys)`: the reward that a configuration with these keys builds."""
    monkeypatch.setenv("RLPT_JUDGE_TOKEN", TOKEN)
    bench, _ = shared
    table = {"kind": "judge", "address": address, "model": "one-sentence", "max_failed_share": 1.0}
    known = bench.shards.token_bytes()
    kit = Kit({}, bench.markers, True, lambda: [*known, *[b""] * 64])

    def made(**keys: object) -> Judge:
        return parse(JudgeReward, table | keys, "reward").build(kit)

    return made


@pytest.fixture(scope="module")
def groups(shared):
    """Real rollouts; what stands for their prediction is the thought's second half."""
    bench, engine = shared
    sync.publish(bench.policy, engine, 0)
    prompts = held_out(bench.shards.split("dev"), bench.cfg.prompts, bench.markers, 3, 0, ())
    sampled = generate(engine, list(prompts), 4, "judge")
    return [
        replace(group, rollouts=tuple(replace(r, thought_len=0) for r in group.rollouts))
        for group in sampled
    ]


def lost(found: Rewarded) -> Sequence[float]:
    assert found.kept_PG is not None
    assert (~found.kept_PG).sum() == sum(
        found.sums[f"reward/judge_{why}"][0] for why in ("failed", "rubbish")
    )
    return [found.sums[f"reward/judge_{why}"][0] for why in ("failed", "rubbish")]


def test_answers_of_a_real_server_are_verdicts(judge, groups) -> None:
    reward = judge()
    reward.cfg.refuse_unready()
    found = reward(groups)
    assert lost(found) == [0.0, 0.0]
    said = [[reward._pair(group, g).prediction.strip() for g in range(4)] for group in groups]
    assert sum(bool(text) for row in said for text in row) >= 6
    assert found.reward_PG.tolist() == [[float(bool(text)) for text in row] for row in said]


def test_an_answer_that_is_cut_short_is_rubbish(judge, groups) -> None:
    found = judge(max_answer_tokens=2)(groups)
    failed, rubbish = lost(found)
    assert failed == 0.0
    assert rubbish >= 6.0


@pytest.mark.parametrize(
    ("keys", "token", "status"),
    [({"model": "another"}, TOKEN, 404), ({}, "wrong", 401)],
    ids=["model", "token"],
)
def test_a_wrong_model_and_a_wrong_token_fail_at_once(
    judge, groups, keys: dict, token: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPT_JUDGE_TOKEN", token)
    reward = judge(**keys)
    with pytest.raises(UnansweredError, match=f"HTTP status {status}"):
        reward.ask(question(reward._pair(groups[0], 0), "same"))
    failed, rubbish = lost(reward(groups))
    assert failed >= 6.0
    assert rubbish == 0.0
