"""The answer reward: does what the policy says after its thought end in the right answer? 0 or 1."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar, Literal

from rlpt.reward.base import Kit, RewardBase
from rlpt.reward.match import Compared

How = Literal["numeric", "exact"]


class AnswerReward(RewardBase):
    """1 where the first line of the prediction holds the right answer, else 0; an empty prediction scores 0."""

    kind: Literal["answer"] = "answer"
    how: How = "numeric"
    """numeric: its last number equals the gold one: 1,200 = $1200.00, .5 = 1/2; a percent sign, a unit and what stands
    before the number do not matter. exact: the line is the gold text, but for spaces around it."""

    within_text: ClassVar[bool] = False

    def build(self, kit: Kit) -> Compared:
        return Compared(self.kind, self._compare, kit)

    def _compare(self, prediction: bytes, gold_tokens: Sequence[bytes]) -> float:
        gold = b"".join(gold_tokens).decode(errors="replace")
        return ANSWERS[self.how](prediction.decode(errors="replace"), gold)


def numeric_match(prediction: str, gold: str) -> float:
    """1 iff the last number of the prediction's first line is the last one of the gold text's."""
    right = number(first_line(gold))
    return float(right is not None and number(first_line(prediction)) == right)


def exact_match(prediction: str, gold: str) -> float:
    """1 iff the first lines are the same text, but for spaces around them."""
    right = first_line(gold)
    return float(bool(right) and first_line(prediction) == right)


ANSWERS: dict[How, Callable[[str, str], float]] = {"numeric": numeric_match, "exact": exact_match}


def first_line(text: str) -> str:
    """The first line that is not empty, without the spaces around it: a policy that goes on has still answered."""
    return text.strip().partition("\n")[0].strip()


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# A minus behind a digit subtracts; before one, or before its currency, it is a sign.
_NUMBER = re.compile(
    rf"(?P<minus>(?<![\d)])[-\u2212])?[$\u20ac\xa3]?(?P<whole>{_DIGITS}(?:\.\d+)?|(?<![\d.])\.\d+)(?:/(?P<under>0*[1-9]\d*))?",
    re.ASCII,
)


def number(text: str) -> Fraction | None:
    """The last number of a text, exactly: digits with or without commas between thousands, a decimal point, a fraction
    a/b. Powers of ten, mixed fractions and numbers in words are not read. None: there is none."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    found = matches[-1]
    # Decimal reads any number of digits; int refuses more than a few thousand.
    value = Fraction(Decimal(found["whole"].replace(",", "")))
    value /= Fraction(Decimal(found["under"] or 1))
    return -value if found["minus"] else value
