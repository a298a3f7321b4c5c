"""The same records from a real policy: against the model itself in float64, and across the seam."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
import zstandard

from rlpt.evaluate import files
from rlpt.evaluate.controls import named_prefix
from rlpt.evaluate.evaluation import evaluate
from rlpt.evaluate.quantities import Resampling
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt_data.strict import UserError


@pytest.fixture(scope="module")
def lm():
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,  # far from uniform: a wrong row or a wrong id must show
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def found(lm, tiny, procedure, world):
    prompts = tiny.prompts(12)
    scorers = [
        Scorer(Policy(lm), banned, world, tokens=300, certainty=bool(banned))
        for banned in (tiny.markers.ids, ())
    ]
    windows = [prompt.trunk for prompt in prompts]
    return evaluate(
        *(scorers[0], tiny.engine(), prompts, windows, procedure),
        *(Resampling("document", 50, 0), world),
        unbanned=scorers[1],
    )


def log_probabilities(lm, ids, start, banned):
    """log p of ids[start:], float64, one sequence at a time."""
    with torch.no_grad():
        logits_TV = deepcopy(lm).double()(torch.tensor([ids])).logits[0]
    logits_TV[:, list(banned)] = -torch.inf
    logp_TV = logits_TV.log_softmax(dim=-1)
    return [float(logp_TV[t - 1, ids[t]]) for t in range(start, len(ids))]


def test_scores_are_the_models_own_in_float64(lm, tiny, found):
    opener, closer = tiny.markers.ids
    for prompt, record in zip(tiny.prompts(12)[:3], found.records[:6:2], strict=True):
        context = prompt.trunk.ids[: prompt.cut].tolist()
        text, thought = record.continuation_ids.tolist(), record.thought_ids.tolist()
        framed = [*context, opener, *thought, closer]
        bare = log_probabilities(lm, [*context, *text], len(context), tiny.markers.ids)
        own = log_probabilities(lm, [*framed, *text], len(framed), tiny.markers.ids)
        assert record.logp["no_think"] == pytest.approx(bare, abs=2e-6)
        assert record.logp["own"] == pytest.approx(own, abs=2e-6)
        mass = np.exp(log_probabilities(lm, [*context, opener], len(context), ()))
        assert record.opener_mass == pytest.approx(mass[0], rel=1e-5)


def test_certainty_is_that_of_the_models_own_first_token(lm, tiny, found):
    """Entropy and the largest log-probability, in float64, without a thought and after one."""
    opener, closer = tiny.markers.ids
    for prompt, record in zip(tiny.prompts(12), found.records[::2], strict=True):
        context = prompt.trunk.ids[: prompt.cut].tolist()
        framed = [*context, opener, *record.thought_ids.tolist(), closer]
        for name, ids in (("no_think", context), ("own", framed)):
            every = [
                log_probabilities(lm, [*ids, v], len(ids), tiny.markers.ids)[0] for v in range(6)
            ]
            first = record.firsts[name]
            assert first.token == int(np.argmax(every))
            assert first.confidence == pytest.approx(max(every), abs=2e-6)
            assert first.entropy == pytest.approx(-np.sum(np.exp(every) * every), abs=2e-6)


def test_trunk_and_branch_agree_across_the_seam(found):
    null = found.summary["null"]
    assert null["passes"]
    assert null["max_abs"] < 1e-5
    # It has something to measure: thoughts move these numbers far more than the seam does.
    moved = [record.logp["own"] - record.logp["no_think"] for record in found.records]
    assert np.abs(np.concatenate(moved)).max() > 0.1


def test_a_file_of_an_earlier_version_is_refused(found, tmp_path):
    path = tmp_path / "old.json.zst"
    path.write_bytes(zstandard.compress(b'{"records": [], "windows": []}'))
    with pytest.raises(UserError, match="written by an earlier version"):
        files.load(path)


def test_an_evaluation_reads_back_bit_for_bit(found, tmp_path):
    path = files.path_of(tmp_path, 40)
    files.save(path, found)
    again = files.load(path)
    assert again.summary == found.summary
    assert again.windows == found.windows
    assert again.resampling == found.resampling
    for record, other in zip(found.records, again.records, strict=True):
        assert record.key == other.key
        assert all(np.array_equal(record.logp[name], other.logp[name]) for name in record.logp)
        assert {values.dtype for values in other.logp.values()} == {np.dtype(np.float32)}
        assert np.array_equal(record.thought_ids, other.thought_ids)
        assert named_prefix(other.thought_ids, other.continuation_ids) == record.named_prefix
