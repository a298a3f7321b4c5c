"""The RLVR stage as a configuration: RL on questions whose answers can be checked.

Tang et al. (arXiv 2608.23256, section 4) find that what a pretraining objective is worth shows only after an RLVR stage
that is the same for all. A question is a document with one cut, at its end, and the gold answer is its continuation:
order, supply, advantage, objective and KL are those of every RL stage. What is new: where the documents come from, and
accuracy on held-out questions.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rlpt.reward.answer import AnswerReward
from rlpt.stages import Count, NextTokenStage, RLStage
from rlpt_data.strict import Strict

QUESTION, ANSWER = "{question}", "{answer}"


def readable(path: Path) -> Path:
    """Raises ValueError for a file of another kind."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: neither .jsonl nor .parquet; convert it")
    return path


QuestionFile = Annotated[Path, AfterValidator(readable)]


class QuestionRows(Strict):
    """What the rows of a file of questions hold, and how a question is asked."""

    question_field: str = "question"
    answer_field: str = "answer"
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer in the answer field; its last match counts. None: the whole
    field. Of GSM8K: '#### (.+)'."""
    template: str = f"Question: {QUESTION}\nAnswer: {ANSWER}"
    """The text of a row. Spaces before {answer} belong to the answer; the policy thinks in front of them."""

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern).groups if pattern is not None else 1
        except re.error as error:
            raise ValueError(f"answer_pattern = {pattern!r}: {error}; correct it") from error
        if not groups:
            raise ValueError(
                f"answer_pattern = {pattern!r}: put the answer into a group, as in '#### (.+)'"
            )
        return pattern

    @field_validator("template")
    @classmethod
    def _asks(cls, template: str) -> str:
        question, answer = (template.find(part) for part in (QUESTION, ANSWER))
        once = template.count(QUESTION) == template.count(ANSWER) == 1
        if not once or question > answer:
            raise ValueError(
                f"template = {template!r}: needs {QUESTION} once and, after it, {ANSWER} once"
            )
        return template


class QuestionsConfig(QuestionRows):
    """Files of questions and gold answers, `.jsonl` or `.parquet`, a question a row. They are encoded by the tokenizer
    of the shards, and nothing in them is special. `prompts.context_tokens` and `prompts.horizon_tokens` are the longest
    question and the longest answer: longer ones are dropped, and counted."""

    train: QuestionFile
    test: QuestionFile
    """Held out: accuracy is measured on these."""
    held_out: Count = 256
    """Questions of `test` that are asked, spread evenly over the file; 0: all."""
    samples: Annotated[int, Field(ge=1, le=1024)] = 4
    """Thoughts with an answer for every held-out question: the k of mean@k and the most of pass@k."""


class RLVRStage(RLStage):
    # A stage of this kind is an RL stage wherever one is asked for.
    kind: Literal["rlvr"]  # pyright: ignore[reportIncompatibleVariableOverride]
    reward: AnswerReward = AnswerReward()  # pyright: ignore[reportIncompatibleVariableOverride]
    questions: QuestionsConfig

    @model_validator(mode="after")
    def _asks_questions_alone(self) -> "RLVRStage":
        if self.curriculum is not None:
            raise ValueError(
                "curriculum picks cuts by their entropy, and a question has one cut; drop it, or use difficulty"
            )
        return self

    def refuse_unfit(self, most_thought: int, most_prediction: int) -> None:
        """Raises ValueError where an answer without a thought could not be sampled; both in tokens."""
        if most_prediction > most_thought:
            raise ValueError(
                f"stage {self.name}: thought.prediction_tokens = {most_prediction} exceeds thought.budget_tokens = "
                f"{most_thought}: the answer without a thought, the control, is sampled in the thought's place; "
                "raise the budget"
            )


RunStage = Annotated[NextTokenStage | RLStage | RLVRStage, Field(discriminator="kind")]
