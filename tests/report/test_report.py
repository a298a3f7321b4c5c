"""The report says what the run says, escapes what the web says, loads nothing and hides nothing
that is missing.
"""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import zstandard

from rlpt.cli import main
from rlpt.report import write
from rlpt_data.strict import UserError

PLAIN = str.maketrans({"\N{MINUS SIGN}": "-", "\N{NON-BREAKING HYPHEN}": "-", "\N{EN DASH}": "-"})
HOSTILE = (
    '<script>alert(1)</script><img src="http://x.example/p.png" onerror=alert(2)>&\u202eabc\x07'
)


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts)).translate(PLAIN)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, make_run):
    return write([make_run(tmp_path_factory.mktemp("plain") / "run")]).read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, make_run):
    return write([make_run(tmp_path_factory.mktemp("hostile") / "run", HOSTILE)]).read_text()


def test_the_page_opens_with_the_verdict_in_plain_words_and_its_figures(plain):
    text = Page(plain).text
    opening = text[: text.index("Before and after")]
    assert "harmful Thinking hurts" in opening
    assert (
        "Held-out gain -0.100 [-0.120, -0.080] nats per token, -0.500 [-0.520, -0.480] before"
        in opening
    )
    assert "a change of +0.400 [+0.380, +0.420]" in opening
    assert "4 layers, 256 wide, 4.2 million parameters" in opening
    assert "It is not evidence of reasoning" in opening
    assert "in 2 min 05 s" in opening


def test_figures_of_controls_and_checks_are_on_the_page(plain):
    text = Page(plain).text
    assert (
        "filler as many neutral tokens: what length and computation do -0.200 [-0.220, -0.180]"
        in text.replace("fillera", "filler a").replace("do-", "do -")
    )
    assert "FAILED wrong target: own thought, another text: +0.100 [+0.080, +0.120]" in text
    assert "passed null" in text
    assert "First token right, after a thought0.2000.250+0.050" in text.replace(
        " 0.2", "0.2"
    ).replace(" +0", "+0")


def test_web_text_never_becomes_markup(plain, hostile):
    clean, page = Page(plain), Page(hostile)
    # The same page tag by tag: whatever the text says, it adds no element.
    assert page.tags == clean.tags
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_characters_that_hide_or_reverse_text_are_spelled_out(hostile):
    assert "\u202e" not in hostile
    assert "\x07" not in hostile
    assert "\\u202eabc\\u0007" in Page(hostile).text


def test_the_page_loads_nothing(plain):
    page = Page(plain)
    loads = {"src", "href", "srcset", "data", "action", "poster", "background"}
    references = [(t, n, v) for t, n, v in page.attributes if n.split(":")[-1] in loads]
    assert all(value.startswith("#") for _, _, value in references)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "://" not in plain
    assert "@import" not in plain
    assert set(re.findall(r"url\(([^)]*?)\)", plain)) <= set(re.findall(r"url\((#[^)]*)\)", plain))


def test_only_the_pages_own_script_may_run(plain):
    """By its hash in the security policy; the other script element is data, and base64 at that."""
    own = plain[plain.rindex("<script>") + len("<script>") : plain.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    policy = next(v for t, n, v in Page(plain).attributes if t == "meta" and "default-src" in v)
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    (data,) = re.findall(r'<script type="text/plain" id="rollouts-data">([^<]*)</script>', plain)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", data)


def test_ids_of_the_drawings_do_not_collide(plain):
    ids = [value for _, name, value in Page(plain).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_drawings_take_both_themes_from_the_page(plain):
    assert "color-scheme: light dark" in plain
    assert "--c1: light-dark(" in plain
    assert "var(--c1)" in plain
    assert not re.search(r"#1000\d\d", plain)


@pytest.mark.usefixtures("undrawn")
def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path, make_run):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "stage": "a\\ud800b"}\n')
    # Nothing of ours writes one: the line is no line.
    assert "metrics.jsonl: line 41 is damaged and left out" in write([folder]).read_text()


@pytest.mark.parametrize(
    ("piece", "sentence"),
    [
        ("environment.json", "environment.json: absent"),
        (
            "summary.json",
            "summary.json: absent, so the final numbers (did the run finish?) cannot be shown",
        ),
        ("metrics.jsonl", "metrics.jsonl: absent, so the curves cannot be shown"),
        ("evaluations.jsonl", "evaluations.jsonl: absent, so held-out evaluations cannot be shown"),
        ("rollouts", "rollouts/: no dump, so no thoughts can be shown"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_missing_piece_is_named_and_the_rest_is_drawn(tmp_path, piece, sentence, make_run):
    run = make_run(tmp_path / "run")
    path = run / piece
    for file in path.glob("*") if path.is_dir() else [path]:
        file.unlink()
    text = Page(write([run]).read_text()).text
    assert "Not in this report" in text
    assert sentence in text
    assert "rlpt run" in text


def test_a_complete_run_has_nothing_to_be_sorry_for(plain):
    assert "Not in this report" not in Page(plain).text


@pytest.mark.usefixtures("undrawn")
def test_damaged_lines_are_counted_not_swallowed(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    (run / "rollouts" / "step_000040.jsonl.zst").write_bytes(b"not zstandard")
    text = Page(write([run]).read_text()).text
    assert "metrics.jsonl: line 41 is damaged and left out" in text
    assert "rollouts/step_000040.jsonl.zst: damaged" in text


def test_a_folder_without_a_run_is_refused_with_the_remedy(tmp_path, make_run):
    with pytest.raises(UserError, match=r"no run here .*; run `rlpt train`"):
        write([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        write([tmp_path / "absent"])


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_evaluation_claims_nothing(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    (run / "evaluations.jsonl").unlink()
    (run / "summary.json").write_text(json.dumps({"steps": 3}))
    text = Page(write([run]).read_text()).text
    assert "not evaluated No verdict: this run holds no held-out evaluation" in text


@pytest.mark.usefixtures("undrawn")
def test_a_reward_that_scores_no_tokens_is_shown_without_colour(tmp_path, make_run, group):
    unscored = group(40) | {"no_think_logp": None}
    unscored["rollouts"] = [r | {"logp": None, "gain": None} for r in unscored["rollouts"]]
    run = make_run(tmp_path / "run")
    data = zstandard.compress(json.dumps(unscored).encode())
    (run / "rollouts" / "step_000040.jsonl.zst").write_bytes(data)
    assert "so nothing is coloured" in Page(write([run]).read_text()).text


@pytest.mark.usefixtures("undrawn")
def test_numbers_that_are_none_are_counted_metric_by_metric(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "stage": "x", "reward/mean": NaN, "y": Infinity, "z": -1e200}\n')
    text = Page(write([run]).read_text()).text
    assert "metrics.jsonl: z is no finite number in 1 of 1 steps" in text
    assert "metrics.jsonl: reward/mean is no finite number in 1 of 41 steps" in text
    assert "metrics.jsonl: y is no finite number in 1 of 1 steps" in text


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_that_a_summary_is_damaged(tmp_path, make_run, capsys):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text('{"steps": ')
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run)])
    assert stop.value.code == 0
    assert "summary.json: damaged" in capsys.readouterr().out
    assert "summary.json: damaged" in Page((run / "report.html").read_text()).text


@pytest.mark.usefixtures("undrawn")
def test_lines_that_are_no_objects_are_damaged(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('3\n{"step": 50}\n')
    text = Page(write([run]).read_text()).text
    assert "evaluations.jsonl: line 3 is damaged" in text
    assert "evaluations.jsonl: line 4 is damaged" in text


@pytest.mark.usefixtures("undrawn")
def test_a_link_in_a_run_of_somebody_else_is_not_written_through(tmp_path, make_run):
    run, ours = make_run(tmp_path / "run"), tmp_path / "ours.txt"
    ours.write_text("ours")
    for name in ("report.tmp", "report.html"):
        (run / name).symlink_to(ours)
    write([run])
    assert ours.read_text() == "ours"
    assert not (run / "report.html").is_symlink()
