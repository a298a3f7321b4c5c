"""What thinking costs: tokens and FLOPs of the sampled thoughts, decoding included. `rlpt.flops` counts them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlpt.evaluate.records import Record
from rlpt.flops import Documents, Work, engine_work, forward_flops
from rlpt.types import Prompt


def thinking(prompts: Sequence[Prompt], records: Sequence[Record], config: Any) -> dict[str, float]:
    """Tokens sampled and FLOPs spent, in total and per thought; ``config`` is the transformers configuration.

    Every context is read once and alone, which is all that an empty thought costs; then a thought is decoded with its
    closer, unless that was forced, and with the prediction behind it. Scoring held-out text and controls measures
    thoughts and is not counted.
    """
    read, decoded, tokens = Work(), Work(), 0
    shapes = {prompt.key: _shape(prompt) for prompt in prompts}
    for shape in shapes.values():
        read += engine_work(shape, "naive")[0]
    for record in records:
        shape = _sampled(shapes[record.key[:3]], record)
        tokens += record.thought_actions + _predicted(record)
        if shape.thought:
            decoded += engine_work(shape, "naive")[1]
    reading, decoding = forward_flops(config, read), forward_flops(config, decoded)
    return {
        "tokens": tokens,
        "tokens_per_thought": tokens / len(records),
        "flops": reading + decoding,
        "flops_per_thought": reading / len(shapes) + decoding / len(records),
    }


def _predicted(record: Record) -> int:
    return 0 if record.prediction is None else len(record.prediction.ids)


def _shape(prompt: Prompt) -> Documents:
    """One prompt with an empty thought; its opener is counted by `engine_work`."""
    return Documents(1, 1, 1, len(prompt.policy_ids) - 1, 0, prompt.horizon, 0, 1)


def _sampled(shape: Documents, record: Record) -> Documents:
    """With the thought of a record. Where tokens follow the closer it is read, forced or not, like any other."""
    if record.prediction is None:
        return replace(shape, thought=record.thought_actions)
    return replace(shape, thought=len(record.thought_ids) + _predicted(record), predicts=True)
