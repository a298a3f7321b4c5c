"""TRL's GRPOTrainer on the same problem: the same weights, prompts and lengths, and log p(continuation) as reward.

Its own loop runs: `train()` with one step, generation by transformers, timed by wrapping three of its methods and from
`on_step_begin` to `on_step_end`, which leaves its setting up out. One optimiser step a batch, no reference model, no
checkpointing of activations, completions forced to their full length.
"""

import copy
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from arms import Step, now
from problem import SEED, Problem, word
from torch import Tensor

from rlpt import dist
from rlpt.policy.load import load, named_full_tensors


def why_not() -> str | None:
    """A reason where TRL cannot run here."""
    try:
        import trl
    except ImportError as error:
        return (
            f"trl is not installed ({error}); pip install 'trl>=1.16' into an environment with rlpt"
        )
    if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16):
        return f"trl {trl.__version__} is too old; pip install 'trl>=1.16'"
    return None


class TrlArm:
    """One GRPOTrainer that is asked for one step at a time."""

    name = "trl"

    def __init__(self, given: Problem, world: dist.World, folder: Path, batch: int | None) -> None:
        from datasets import Dataset
        from trl import GRPOTrainer

        quiet()
        self.given = given
        self.device = world.device
        self.batch = batch or given.size.group
        self.spent: defaultdict[str, float] = defaultdict(float)
        lm = model(given, world)
        self.reward = LogProbReward(lm, given, self.batch)
        self.trainer = GRPOTrainer(
            model=lm,
            reward_funcs=self.reward,
            args=settings(given, world, folder, self.batch),
            train_dataset=Dataset.from_list(rows(given)),
            processing_class=tokenizer(given),
            callbacks=[stopwatch(self)],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        self._time("_generate_single_turn", "generate")
        self._time("_calculate_rewards", "score")
        self._time("_generate_and_score_completions", "before_training")

    def _time(self, method: str, name: str) -> None:
        call = getattr(self.trainer, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timer(name):
                return call(*args, **kwargs)

        setattr(self.trainer, method, timed)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add a span to what was spent under ``name``, and its CPU time."""
        started, started_cpu = now(self.device), time.process_time()
        yield
        self.spent[name] += now(self.device) - started
        self.spent[f"{name}_cpu"] += time.process_time() - started_cpu

    def step(self) -> Step:
        self.spent.clear()
        self.trainer.train()
        spent = self.spent
        lengths = self.reward.lengths
        assert lengths == {self.given.size.thought}, f"completions of {lengths} tokens"
        # What else happens between a generation and the loss (padding, decoding, logging) is part of the step alone.
        train, train_cpu = (
            spent[f"step{kind}"] - spent[f"before_training{kind}"] for kind in ("", "_cpu")
        )
        return Step(
            step=spent["step"],
            generate=spent["generate"],
            score=spent["score"],
            train=train,
            score_train=spent["score"] + train,
            step_cpu=spent["step_cpu"],
            score_train_cpu=spent["score_cpu"] + train_cpu,
            reward=self.reward.mean,
        )


def model(given: Problem, world: dist.World) -> Any:
    """The weights that rlpt's arms start from, in plain transformers."""
    config = copy.deepcopy(given.plan.config)
    lm = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )
    weights = dict(named_full_tensors(load(given.policy, given.plan, world, SEED)))
    lm.load_state_dict(weights, strict=False)
    return lm.to(world.device)


def tokenizer(given: Problem) -> Any:
    """Words to the ids of the problem; the closer ends a completion, as `</think>` would."""
    found = transformers.PreTrainedTokenizerFast(tokenizer_file=str(given.shards.tokenizer_path))
    # In the order of their ids.
    found.add_special_tokens({"additional_special_tokens": [given.policy.opener]})
    found.add_special_tokens({"eos_token": given.policy.closer, "pad_token": given.policy.closer})
    markers = found.convert_tokens_to_ids([given.policy.opener, given.policy.closer])
    assert tuple(markers) == given.markers.ids, markers
    return found


def rows(given: Problem) -> list[dict[str, Any]]:
    """Prompts as text, opener included, and what the reward needs."""
    opener = given.policy.opener
    return [
        {
            "prompt": " ".join([*map(word, prompt.policy_ids[:-1].tolist()), opener]),
            "prompt_ids": prompt.policy_ids.tolist(),
            "continuation_ids": prompt.continuation_ids.tolist(),
        }
        for prompt in given.prompts
    ]


def settings(given: Problem, world: dist.World, folder: Path, batch: int) -> Any:
    """GRPOConfig. What is not named here is TRL's default: loss dapo, beta 0, group-scaled rewards, fused AdamW."""
    from trl import GRPOConfig

    size = given.size
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=1,
        num_generations=size.group,
        max_completion_length=size.thought,
        generation_kwargs={"min_new_tokens": size.thought},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=size.sequences // batch,
        num_iterations=1,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=given.policy.compute_dtype == "bfloat16",
        use_cpu=world.device.type == "cpu",
        seed=SEED,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class LogProbReward:
    """log p(continuation | prompt, completion) per token under the policy, one forward per batch of completions."""

    __name__ = "log_prob"

    def __init__(self, lm: Any, given: Problem, batch: int) -> None:
        self.lm = lm
        self.closer = given.markers.closer
        self.batch = batch
        self.lengths: set[int] = set()
        self.mean = float("nan")

    def __call__(
        self,
        completion_ids: list[list[int]],
        prompt_ids: list[list[int]],
        continuation_ids: list[list[int]],
        **_: Any,
    ) -> list[float]:
        self.lengths = set(map(len, completion_ids))
        parts = zip(prompt_ids, completion_ids, continuation_ids, strict=True)
        sequences = [[*x, *z, self.closer, *y] for x, z, y in parts]
        horizon = len(continuation_ids[0])
        found: list[float] = []
        for start in range(0, len(sequences), self.batch):
            found += self._scores(torch.tensor(sequences[start : start + self.batch]), horizon)
        self.mean = sum(found) / len(found)
        return found

    @torch.no_grad()
    def _scores(self, ids_NT: Tensor, horizon: int) -> list[float]:
        ids_NT = ids_NT.to(self.lm.device)
        # Only the rows that predict the continuation go through the head.
        logits_NCV = self.lm(input_ids=ids_NT, use_cache=False, logits_to_keep=horizon + 1).logits
        logp_NCV = logits_NCV[:, :-1].float().log_softmax(-1)
        return logp_NCV.gather(2, ids_NT[:, -horizon:, None])[..., 0].mean(1).tolist()


def stopwatch(arm: TrlArm) -> transformers.TrainerCallback:
    """Times the step as the trainer counts it."""

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.running = ExitStack()
            self.running.enter_context(arm.timer("step"))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.running.close()

    return Stopwatch()


def quiet() -> None:
    """Keep progress and advice of the libraries out of the tables."""
    transformers.logging.set_verbosity_error()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
