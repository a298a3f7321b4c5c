"""Text of pages, thoughts and names reaches a terminal and a page as text: no command to it, and no markup of it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlpt import console
from rlpt.cli import cli
from rlpt.report import write
from rlpt.summary import text
from rlpt_data import datasheet
from rlpt_data.shards import ShardFolder
from rlpt_data.visible import visible

COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u200b\u2028\U000e0000-\U000e007f]")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("\x1b[2J", "\\u001b[2J"),
        ("\x9b31m", "\\u009b31m"),
        ("a\rb", "a\\u000db"),
        ("\u202eabc", "\\u202eabc"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("\U000e0041", "\\ue0041"),
        ("\ud800", "\\ud800"),
        ("line\nand\ttab", "line\nand\ttab"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
    ],
)
def test_what_hides_is_spelled_out_and_what_people_write_stays(given: str, shown: str) -> None:
    assert visible(given) == shown


@pytest.mark.parametrize("command", ["inspect", "stats"])
def test_a_page_sends_the_terminal_no_command(
    hostile_shards: Path, tmp_path: Path, command: str
) -> None:
    options = ["--html", str(tmp_path / "sheet.html")] if command == "inspect" else []
    found = CliRunner().invoke(cli, ["data", command, str(hostile_shards), *options])
    assert found.exit_code == 0
    assert not COMMANDS.search(found.output)
    if command == "inspect":
        assert "\\u001b[2J" in found.output


def test_lines_of_progress_and_summaries_send_no_command_either(
    hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.say(hostile)
    print(text({"verdict": hostile, hostile: 1.0}))
    said = "".join(capsys.readouterr())
    assert not COMMANDS.search(said)
    assert "\\u001b]0;owned\\u0007" in said


class Elements(HTMLParser):
    """The tags of a page, its attributes and its words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def refuse_markup(page: str) -> None:
    found = Elements(page)
    assert not {"img", "iframe", "object", "base", "form"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [value for _, value in found.attributes if "javascript:" in (value or "")]
    assert "<script>window.struck = 1</script>" in found.words
    assert "{{ 7 * 7 }}" in found.words
    assert not COMMANDS.search(page.replace("\n", ""))


def test_a_datasheet_shows_markup_and_has_none_of_it(hostile_shards: Path) -> None:
    page = datasheet.render(ShardFolder.open(hostile_shards))
    refuse_markup(page)
    assert "script" not in Elements(page).tags
    assert "default-src 'none'" in page


@pytest.mark.slow
def test_a_name_with_markup_stays_a_name_in_every_drawing(
    hostile: str, tmp_path: Path, module_at
) -> None:
    """The drawings are real here: run, stage and metric are named by the enemy."""
    runs = module_at(Path(__file__).parents[1] / "report" / "conftest.py")
    name = "x' onload='a()' $\\frac{$ <script>window.struck = 1</script> {{ 7 * 7 }}"
    folders = [
        runs.build_run(tmp_path / each.replace("/", "_"), hostile) for each in (name, "plain")
    ]
    page = write(folders, tmp_path / "report.html").read_text()
    found = Elements(page)
    assert "script" in found.tags
    assert found.tags.count("script") == 2
    assert not {"img", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not COMMANDS.search(page.replace("\n", ""))
