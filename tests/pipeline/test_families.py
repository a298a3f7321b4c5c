"""Model families: the trainer's log-probabilities are transformers' own, or the model is refused by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlpt import dist
from rlpt.config import PolicyConfig
from rlpt.policy import load
from rlpt.policy.logprobs import check_head, head_logprob
from rlpt.policy.policy import Policy
from rlpt.policy.scoring import Scorer
from rlpt.prompts import window
from rlpt_data.shards import ShardFolder
from rlpt_data.strict import UserError

NO_SPECIAL_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "mistral": ("Mistral", {}),
    "gemma": ("Gemma", {"head_dim": 12}),
    "gemma2": ("Gemma2", {"head_dim": 12, "final_logit_softcapping": 2.0}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere": ("Cohere", {"logit_scale": 0.4}),
}


def tiny(family: str, vocab_size: int) -> Any:
    """A random model of two small layers; matrices large enough that logits are far from flat."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
        }
        | NO_SPECIAL_IDS
        | changes
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(
    family: str, shards: ShardFolder, world: dist.World, tmp_path: Path
) -> None:
    vocab_size = len(shards.token_bytes())
    lm = tiny(family, vocab_size)
    lm.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(shards.tokenizer_path.read_bytes())
    cfg = PolicyConfig(path=tmp_path)
    plan = load.blueprint(cfg, shards, 100)
    assert plan.vocabulary.size == vocab_size + 2
    # With both markers banned the softmax is over the ids that the saved model has.
    scorer = Scorer(load.load(cfg, plan, world, seed=0), plan.vocabulary.markers.ids, world, 200)
    document = shards.split("train")[0]
    trunk = window(document, 0, 0, min(40, len(document.ids)))
    (found,) = scorer.trunks([(trunk, 1, len(trunk.ids))])
    ids = torch.from_numpy(trunk.ids)
    with torch.no_grad():
        logits = lm(input_ids=ids[None]).logits[0, :-1].double()
    expected = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].numpy()
    assert logits.std() > 0.2, "flat logits would hide a mistake"
    assert np.abs(found.logp - expected).max() < 2e-5
    assert np.array_equal(found.argmax, logits.argmax(-1).numpy())


def test_logits_are_capped_first_and_scaled_after() -> None:
    head = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-2.0], [4.0]]))
    config = SimpleNamespace(final_logit_softcapping=2.0, logits_scaling=4.0, logit_scale=0.5)
    found = head_logprob(head, config, torch.ones(1, 1), torch.zeros(3).long(), torch.arange(3), ())
    score = 2.0 * np.tanh(np.array([1.0, -2.0, 4.0]) / 2.0) * 0.5 / 4.0
    expected = score - np.log(np.exp(score).sum())
    assert np.allclose(found.logp.detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50),
            r"GPT2LMHeadModel keeps no decoder blocks in model\.layers",
        ),
        (
            transformers.GPTNeoXConfig(
                hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=50
            ),
            r"GPTNeoXForCausalLM keeps no decoder blocks in model\.layers",
        ),
        (
            transformers.ModernBertDecoderConfig(
                hidden_size=32, num_attention_heads=2, num_hidden_layers=1
            ),
            "ModernBertDecoderForCausalLM has no linear lm_head",
        ),
    ],
    ids=["gpt2", "gpt_neox", "modernbert"],
)
def test_a_model_of_another_shape_is_refused_by_class(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load.meta_model(config)


def test_logits_that_mean_something_else_are_refused() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    class Curious(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs).logits * self.model.multiplier

    config = tiny("llama", 50).config
    with pytest.raises(UserError, match="Doubled treats its logits in a way rlpt does not know"):
        check_head(Doubled(config))
    with pytest.raises(UserError, match=r"Curious computes logits from more .*multiplier"):
        check_head(Curious(config))


def test_the_trial_of_the_head_leaves_the_model_and_the_random_state_alone() -> None:
    lm = tiny("llama", 50)
    parts, state = (lm.model, lm.lm_head, list(lm.state_dict())), torch.get_rng_state()
    check_head(lm)
    assert parts == (lm.model, lm.lm_head, list(lm.state_dict()))
    assert torch.equal(state, torch.get_rng_state())


def test_a_buffer_that_nothing_fills_is_refused_by_name() -> None:
    lm = load.meta_model(tiny("llama", 50).config)
    lm.model.layers[1].register_buffer("drift", torch.zeros(3, device="meta"))
    with pytest.raises(UserError, match=r"buffer model\.layers\.1\.drift of LlamaForCausalLM"):
        load._materialise(Policy(lm), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_buffer_outside_the_files_that_transformers_does_not_know_is_refused(
    dtype: torch.dtype,
) -> None:
    lm = tiny("llama", 50)
    norm = lm.model.norm
    norm.register_buffer("drift", torch.zeros(3, dtype=dtype, device="meta"), persistent=False)
    with pytest.raises(UserError, match=r"buffer model\.norm\.drift of LlamaForCausalLM"):
        load._restore(lm, "model.norm", norm)
