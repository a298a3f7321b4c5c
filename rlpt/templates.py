"""How page text stands before the policy: as the beginning of a document, or inside the turns of a chat.

A template's special tokens become single ids and its words are encoded once (`rlpt.policy.chat`); page text is spliced
between them as the shard's own ids and is never encoded again.
"""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from rlpt_data.strict import Strict


@dataclass(frozen=True)
class Template:
    """The turns of a chat, as text in which every one of ``specials`` stands for a single id."""

    specials: tuple[str, ...]
    start: str
    """Once, before anything else."""
    system: tuple[str, str]
    """Around the system text; a template without a system turn has none."""
    user: str
    """Before instruction and page text."""
    assistant: str
    """After the page text: what ends the user's turn and begins the policy's."""
    prefill_first: bool = False
    """Whether the prefill stands before the opener; else it is the beginning of the thought."""


TEMPLATES = {
    "chatml": Template(
        ("<|im_start|>", "<|im_end|>"),
        "",
        ("<|im_start|>system\n", "<|im_end|>\n"),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": Template(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": Template(
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        ("", ""),
        "<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
    ),
    "plain": Template((), "", ("", "\n\n"), "Text:\n", "\n\nAnswer:\n", prefill_first=True),
}
"""By name. plain has no special tokens, for models that know no turns; its prefill leads up to the thought."""


class Pieces(NamedTuple):
    """The texts around page text, in the order in which the policy sees them."""

    head: str
    """Before page text."""
    tail: str
    """After it, up to where the policy answers."""
    lead: str
    """Prefill before the opener."""
    prefill: str
    """Prefill after the opener."""
    bridge: str
    """Between the closer and held-out text that is scored."""


class InlineFrame(Strict):
    """The document simply goes on: nothing stands around its text."""

    kind: Literal["inline"] = "inline"

    most_before: ClassVar[int] = 0
    """Tokens before page text, at most."""
    most_after: ClassVar[int] = 0
    """Tokens after page text that are neither thought nor text, at most."""

    def asking(self, instruction: str) -> "AskedFrame":
        """The frame of another task."""
        return AskedFrame(instruction)


INLINE = InlineFrame()


class AskedFrame(NamedTuple):
    """Page text, then the words that ask a policy without instructions for another task; then it thinks."""

    words: str

    @property
    def most_before(self) -> int:
        return 0

    @property
    def most_after(self) -> int:
        return len(self.words.encode())


class ChatFrame(Strict):
    """Page text in a user's turn, the thought and what follows it in the answer; in RL stages and evaluations, while
    next-token stages show text as it is. A match compares bytes: say in `instruction` that spaces count."""

    kind: Literal["chat"]
    template: str
    """chatml, llama3, gemma or plain: what the policy was taught."""
    system: str = ""
    """Text of the system turn; "": there is none."""
    instruction: str = "Continue the following text."
    """Before the page text, in the user's turn, with an empty line between them."""
    prefill: str = ""
    """Words put in the policy's mouth: part of the prompt, never actions."""
    bridge: str = "\n\n"
    """Text between the closer and held-out text where that is scored; `answer_open` follows it."""
    answer_open: str = ""
    """What a prediction's answer stands behind, such as "<answer>"; "": all of the prediction is the answer."""
    answer_close: str = ""
    """What ends the answer. Of several whole pairs the last one counts; without any the prediction is empty."""

    @field_validator("template")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in TEMPLATES:
            raise ValueError(f"template = {name!r} is unknown; known are {', '.join(TEMPLATES)}")
        return name

    @model_validator(mode="after")
    def _texts_fit(self) -> "ChatFrame":
        if self.system and not any(self.known.system):
            raise ValueError(
                f"template = {self.template!r} has no system turn; put the text into `instruction`"
            )
        if bool(self.answer_open) != bool(self.answer_close):
            raise ValueError("answer_open and answer_close go together; set both or neither")
        return self

    def asking(self, instruction: str) -> "ChatFrame":
        """The frame of another task: another instruction."""
        return self.model_copy(update={"instruction": instruction})

    @property
    def known(self) -> Template:
        return TEMPLATES[self.template]

    @property
    def pieces(self) -> Pieces:
        template = self.known
        system = self.system.join(template.system) if self.system else ""
        instruction = f"{self.instruction}\n\n" if self.instruction else ""
        lead, prefill = (self.prefill, "") if template.prefill_first else ("", self.prefill)
        head = f"{template.start}{system}{template.user}{instruction}"
        return Pieces(head, template.assistant, lead, prefill, self.bridge + self.answer_open)

    @property
    def most_before(self) -> int:
        return self._most(self.pieces.head)

    @property
    def most_after(self) -> int:
        return sum(map(self._most, self.pieces[1:]))

    def _most(self, text: str) -> int:
        """No tokenizer makes more tokens of a text than it has bytes."""
        parts = split(text, self.known.specials)
        return sum(1 if special else len(part.encode()) for part, special in parts)


FrameConfig = Annotated[InlineFrame | ChatFrame, Field(discriminator="kind")]


def split(text: str, specials: tuple[str, ...]) -> list[tuple[str, bool]]:
    """The parts of a text in order, and which of them are special tokens; none is empty."""
    if not specials:
        return [(text, False)] if text else []
    parts = re.split(f"({'|'.join(map(re.escape, specials))})", text)
    return [(part, part in specials) for part in parts if part]
