"""What thinking costs: tokens and FLOPs of the sampled thoughts, decoding included. `rlpt.flops` counts them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlpt.evaluate.records import Record
from rlpt.flops import Documents, Work, engine_work, forward_flops
from rlpt.types import Prompt


def thinking(
    prompts: Sequence[Prompt], records: Sequence[Record], config: Any, prediction: int = 0
) -> dict[str, float]:
    """Tokens sampled and FLOPs spent, in total and per thought; ``config`` is the transformers configuration.

    Every context is read once and alone, which is all that an empty thought costs; then a thought is decoded with its
    closer, unless that was forced, and with ``prediction`` tokens behind it at most. Scoring held-out text and controls
    measures thoughts and is not counted.
    """
    read, decoded, tokens = Work(), Work(), 0
    shapes = {prompt.key: _shape(prompt, prediction) for prompt in prompts}
    for shape in shapes.values():
        read += engine_work(shape, "naive")[0]
    for record in records:
        sampled = len(record.thought_ids) + (record.finish == "closer")
        tokens += sampled + prediction
        # Where tokens follow the closer it is read like any other; else nothing is read after it.
        longest = len(record.thought_ids) + prediction if prediction else sampled
        if longest:
            decoded += engine_work(replace(shapes[record.key[:3]], thought=longest), "naive")[1]
    reading, decoding = forward_flops(config, read), forward_flops(config, decoded)
    return {
        "tokens": tokens,
        "tokens_per_thought": tokens / len(records),
        "flops": reading + decoding,
        "flops_per_thought": reading / len(shapes) + decoding / len(records),
    }


def _shape(prompt: Prompt, prediction: int) -> Documents:
    """One prompt with one thought; its opener is counted by `engine_work`."""
    context = len(prompt.policy_ids) - 1
    return Documents(1, 1, 1, context, 0, prompt.horizon, 0, 1, predicts=prediction > 0)
