"""Extractors by name: functions from the HTML of a page to its text.

Imported in the sandbox alone. An extractor must be a function of its page: nothing it remembers
from one page may change the next, or the shards would depend on the order of the input.
"""

import importlib
from collections.abc import Callable

from rlpt_data.strict import UserError

Extractor = Callable[[str], str | None]
NAMES = ("trafilatura", "resiliparse", "plain")
PROBE = "The quick extractor reads the whole page, and it gives back this sentence of the article."
PROBE_PAGE = (
    "<!doctype html><html><head><title>Probe</title></head><body><nav><a href='/'>Home</a></nav>"
    + f"<main><article><h1>Probe</h1>{''.join(f'<p>{PROBE} Number {n}.</p>' for n in range(8))}"
    + "</article></main><footer>Footer</footer></body></html>"
)


def named(name: str) -> Extractor:
    """The extractor ``name``. Raises UserError when it cannot be imported."""
    builders = {"trafilatura": _trafilatura, "resiliparse": _resiliparse, "plain": _plain}
    try:
        return builders[name]() if name in builders else _custom(name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(NAMES)
        raise UserError(
            f"[source] extractor = {name}: {error}; pip install 'rlpt[data]', or give one of "
            f"{known} or module:function"
        ) from error


def checked(name: str) -> Extractor:
    """``named``, after it has read a page with a known sentence. Raises UserError.

    A missing optional dependency shows here, and not as a corpus without text.
    """
    extract = named(name)
    try:
        text = extract(PROBE_PAGE)
    except Exception as error:
        raise UserError(
            f"[source] extractor = {name}: fails on any page ({type(error).__name__}: {error}); "
            "pip install 'rlpt[data]'"
        ) from error
    if name in NAMES and PROBE not in (text or ""):
        raise UserError(
            f"[source] extractor = {name}: does not find the text of a plain page; reinstall it"
        )
    return extract


def _custom(name: str) -> Extractor:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _plain() -> Extractor:
    from rlpt_data.sources.html_text import text_of

    return text_of


def _trafilatura() -> Extractor:
    import lxml_html_clean  # noqa: F401  # without it trafilatura fails page by page
    from trafilatura import extract
    from trafilatura.settings import use_config

    config = use_config()
    # Its own limit works with signals and wall time; the sandbox limits CPU time.
    config.set("DEFAULT", "EXTRACTION_TIMEOUT", "0")

    def read(html: str) -> str | None:
        return extract(
            html,
            favor_precision=True,
            include_comments=False,
            # It would keep a memory of earlier pages: the text of a page would depend on them.
            deduplicate=False,
            config=config,
        )

    return read


def _resiliparse() -> Extractor:
    from resiliparse.extract.html2text import (
        extract_plain_text,  # pyright: ignore[reportMissingModuleSource]  # compiled
    )

    def read(html: str) -> str | None:
        return extract_plain_text(html, main_content=True, alt_texts=False, comments=False)

    return read
