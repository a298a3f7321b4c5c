"""The plainest extractor there is: text of an HTML page, block by block.

It keeps menus and footers; a later extractor replaces it by name in ``[source] extractor``.
"""

import re
from html.parser import HTMLParser

_SKIPPED = {"script", "style", "noscript", "template", "head", "svg", "nav", "footer", "form"}
_BLOCKS = {
    *("p", "div", "section", "article", "main", "header", "aside", "ul", "ol", "table", "figure"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "dl", "address", "hr"),
}
_LINES = {"br", "li", "tr", "dt", "dd"}
_VOID = {
    "br",
    "hr",
    "img",
    "input",
    "link",
    "meta",
    "wbr",
    "source",
    "area",
    "base",
    "col",
    "embed",
}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._skipped.append(tag)
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            # An unclosed inner element must not swallow the rest of the page.
            del self._skipped[self._skipped.index(tag) :]
        if tag not in _VOID:
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(re.sub(r"\s+", " ", data))

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        # `<![` begins a comment to browsers; the parser knows some words behind it and fails on others.
        return self.parse_bogus_comment(i, bool(report))

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n\n")
        elif tag in _LINES:
            self.parts.append("\n")


def text_of(html: str) -> str:
    """Visible text of a page; paragraphs are separated by an empty line."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", "".join(reader.parts)))
    return re.sub(r"\n{3,}", "\n\n", text).strip()
