"""A pretrained policy on real text: an evaluation's figures are those of plain transformers, one sequence at a time."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor

from rlpt import dist
from rlpt.config import PolicyConfig
from rlpt.evaluate.job import run
from rlpt.jobs import EvalJobConfig
from rlpt.policy import load
from rlpt.prompts import held_out_windows
from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import parse

CORPUS = Path(os.environ.get("RLPT_CORPUS", Path(__file__).parents[2] / "../shared/corpus"))
STORIES = CORPUS / "stories260k" / "hf"
SOURCES = {
    "tinyshakespeare": {"kind": "folder", "path": str(CORPUS / "tinyshakespeare")},
    "books": {"kind": "jsonl", "path": str(CORPUS / "books.jsonl.zst")},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not STORIES.is_dir(), reason=f"no corpus at {CORPUS} (set RLPT_CORPUS)"),
]


@pytest.fixture(scope="module", params=list(SOURCES))
def evaluated(request, tmp_path_factory):
    """(configuration, shards, eval.json, rows of prompts.parquet)."""
    folder = tmp_path_factory.mktemp(request.param)
    books = request.param == "books"
    table = {
        "out": str(folder / "shards"),
        "without_decontamination": True,
        "source": SOURCES[request.param],
        "tokenizer": {"kind": "file", "path": str(STORIES / "tokenizer.json")},
        "split": {"dev": 0.25 if books else 0.0, "test": 0.25 if books else 0.0},
        "max_documents": 12,
    }
    prepare(parse(PrepareConfig, table, "test"))
    job = {
        "policy": {"path": str(STORIES)},
        "shards": table["out"],
        "out_dir": str(folder / "out"),
        "prompts": {"context_tokens": 96, "min_context_tokens": 32, "horizon_tokens": 8},
        "thought": {"budget_tokens": 6},
        "evaluation": {
            "split": "test" if books else "train",
            "prompts": 40,
            # The plays are one document: no thought of another one.
            "controls": ["empty", "filler", "null"],
            "bits_per_byte_tokens": 256,
        },
    }
    config = parse(EvalJobConfig, job, "test")
    run(config)
    eval_json = json.loads((folder / "out" / "eval.json").read_text())
    rows = pq.read_table(folder / "out" / "prompts.parquet").to_pylist()
    return config, ShardFolder.open(table["out"]), eval_json, rows


def log_probabilities(lm, ids, start):
    """log p of ids[start:] of one sequence, markers outside the softmax, in float64."""
    with torch.no_grad():
        logits_TV = lm(torch.tensor([ids])).logits[0, :, :512]
    logp_TV = logits_TV.log_softmax(-1)
    return [float(logp_TV[t - 1, ids[t]]) for t in range(start, len(ids))]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_model(state=None):
    """Transformers' own, its own attention, in float64; with the markers' rows where a state has them."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="eager")
    if state is not None:
        lm.resize_token_embeddings(514, mean_resizing=False)
        lm.load_state_dict(state)
    return lm.double().eval()


def test_bits_per_byte_are_those_of_the_published_model(evaluated):
    config, shards, table, _ = evaluated
    split, lm = shards.split(config.evaluation.split), plain_model()
    windows = held_out_windows(split, 256, 128, config.seed, ())
    nats = [-sum(log_probabilities(lm, window.ids.tolist(), 1)) for window in windows]
    num_bytes = [window.num_bytes(1, len(window.ids)) for window in windows]
    expected = sum(nats) / np.log(2) / sum(num_bytes)
    assert table["bits_per_byte"]["mean"] == pytest.approx(expected, abs=1e-4)
    # Children's stories are far from plays and books, but better than nothing: a uniform model takes 9 bits a token.
    assert expected < 9 * sum(len(window.ids) - 1 for window in windows) / sum(num_bytes)


def test_gain_is_that_of_plain_transformers_on_the_spliced_ids(evaluated):
    config, shards, table, rows = evaluated
    with dist.world() as world:
        policy = load.load(
            config.policy,
            load.blueprint(PolicyConfig(path=STORIES), shards, 256),
            world,
            config.seed,
        )
        state = {name: whole(tensor) for name, tensor in policy.lm.state_dict().items()}
        lm = plain_model(state)
    opener, closer = 512, 513
    documents = {d.document_id: d for d in shards.split(config.evaluation.split)}
    gains = []
    for row in rows:
        cut = row["cut"]
        context = documents[row["document"]].ids[max(0, cut - 96) : cut].tolist()
        text, thought = row["continuation_ids"], row["thought_ids"]
        framed = [*context, opener, *thought, closer]
        bare = sum(log_probabilities(lm, [*context, *text], len(context)))
        own = sum(log_probabilities(lm, [*framed, *text], len(framed)))
        assert (row["logp_no_think"], row["logp_own"]) == pytest.approx((bare, own), abs=1e-4)
        gains.append((own - bare) / 8)
    assert table["gain_heldout"]["mean"] == pytest.approx(np.mean(gains), abs=1e-4)


def test_few_documents_claim_no_interval(evaluated):
    table = evaluated[2]
    assert table["gain_heldout"]["clusters"] < 30
    assert table["gain_heldout"]["ci_low"] is None
    assert table["verdict"] == "inconclusive"
    assert table["bits_per_byte"]["ci_low"] is None
    assert table["leak"]["passes"]
    assert table["null"]["passes"]
