"""Text of pages, thoughts and files as a person may be shown it: nothing in it is hidden, turns the line round or
speaks to the terminal.

What flows in is any text, what flows out is the same with those characters spelled out. Whatever prints or draws
text that rlpt did not write sends it through here; files keep it as it is.
"""

import re
from collections.abc import Iterator
from typing import Any

_SPELLED_OUT = re.compile(
    # Control characters but tab and newline, halves of surrogate pairs, and what turns, hides or ends a line. The
    # joiners U+200C and U+200D stay: words of Persian and families of emoji need them.
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e"
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\U000e0000-\\U000e007f]"
)

_PASSWORD = re.compile(r"://[^/\s@'\"]*@")


def visible(text: str) -> str:
    r"""Control characters and those that hide or reverse text, as \\u202e."""
    return _SPELLED_OUT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_passwords(text: str) -> str:
    """The same text with what stands before the @ of an address left out: a name and a password."""
    return _PASSWORD.sub("://***@", text)


class Visible:
    """A table or text of rich, printed with all its words made visible; its own colours stay."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        for part in console.render(self.body, options):
            yield part if part.control else Segment(visible(part.text), part.style)
