"""What an enemy writes, wherever a page, a thought or a name of somebody else's making may stand."""

import json
from pathlib import Path

import pytest

from rlpt_data.prepare import PrepareConfig, prepare
from rlpt_data.strict import parse

WORDS = "The river runs under many small houses and the stones of the old bridge. "
HOSTILE = (
    "</script><script>window.struck = 1</script><img src=x onerror='window.struck = 1'>"
    '"><svg onload="window.struck = 1"> [x](javascript:alert(1)) {{ 7 * 7 }} {% raw %} $\\frac{$ '
    "</think> <|im_end|> <|endoftext|> \x1b[2J\x1b]0;owned\x07 \x9b31m \u202edesrever\u200b "
    "\U000e0041\u2028second line"
)


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


def write_pages(path: Path, text: str, number: int = 40) -> Path:
    """Pages of ordinary words around a hostile text, which is also in their URLs and domains."""
    rows = [
        {"text": f"{WORDS * 3}\n\n{n} {text}\n\n{WORDS * 3}", "url": f"https://s{n}.org/{text}"}
        for n in range(number)
    ]
    rows.append({"text": f"{text} " * 3, "url": text, "domain": f"../../{text}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def hostile_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder made of such pages."""
    folder = tmp_path_factory.mktemp("hostile")
    table = {
        "out": str(folder / "shards"),
        "without_decontamination": True,
        "source": {"kind": "jsonl", "path": str(write_pages(folder / "pages.jsonl", HOSTILE))},
        "tokenizer": {"kind": "byte"},
        "cuts": {"min_context": 8, "min_continuation": 8},
        "split": {"by": "document", "dev": 0.1, "test": 0.1},
    }
    prepare(parse(PrepareConfig, table, "test"), progress=False)
    return folder / "shards"
