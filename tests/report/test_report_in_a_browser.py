"""The report as a reader meets it, in a real browser: it opens in silence, finds what it is asked for, follows keys and
links, and runs nothing that a page of the web says.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import zstandard

from rlpt.report import write

BENCH = Path(__file__).parents[2] / "launch" / "bench" / "chromium.py"
SPEC = importlib.util.spec_from_file_location("chromium", BENCH)
chromium = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(chromium)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        chromium.installed() is None, reason=f"no browser: none of {', '.join(chromium.NAMES)}"
    ),
]
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
READY = "document.documentElement.dataset.ready"
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_run):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def plain(folder, make_run, many_groups):
    """60 prompts of 3 thoughts, 12 of them in each of 5 steps; document 7 alone speaks of whales."""
    run = make_run(folder / "plain")
    for path in (run / "rollouts").iterdir():
        path.unlink()
    for step in range(1, 6):
        rows = "".join(json.dumps(row) + "\n" for row in many_groups(step))
        path = run / "rollouts" / f"step_{step:06d}.jsonl.zst"
        path.write_bytes(zstandard.compress(rows.encode()))
    return write([run]).as_uri()


@pytest.fixture(scope="module")
def many_groups():
    def rollout(g, n, step):
        gain = (g - 1) * 0.1 + n / 100
        return {
            "thought": f"thought {g} of {'whales' if n == 7 and g == 2 else 'ships'}",
            "ids": [1] * (g + 2),
            "logp": [-2.0 + gain, -2.0, -2.0],
            "gain": gain,
            "reward": gain * 10,
            "advantage": g - 1.0,
            "finish": "closer" if g else "budget",
        }

    def groups(step):
        return [
            {
                "step": step,
                "document": f"d{n}",
                "domain": "sea" if n % 2 else "land",
                "cut": n,
                "context": "before it",
                "continuation_tokens": [" held", " out", f" {n}"],
                "no_think_logp": [-2.0, -2.0, -2.0],
                "rollouts": [rollout(g, n, step) for g in range(3)],
            }
            for n in range(12)
        ]

    return groups


@pytest.fixture
def page(browser):
    return browser.page()


def texts(page, selector):
    return page.ask(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
    )


def count(page):
    return page.ask("document.querySelector('[data-part=count]').textContent")


def chosen(page):
    return page.ask("document.querySelector('[data-chosen] .thought').textContent")


def fill(page, name, value):
    page.ask(
        f"(() => {{ const f = document.querySelector('[data-part=form]').elements[{name!r}];"
        f"f.value = {value!r}; f.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def test_it_opens_without_a_word_on_the_console_and_shows_the_first_prompt(page, plain):
    page.open(plain, READY)
    assert page.said == []
    assert count(page) == "60 of 60 prompts, 180 thoughts"
    assert texts(page, ".context mark") == [" held out 0"]
    assert chosen(page) == "thought 2 of ships"
    # Only the rows in view are elements.
    assert 5 < len(texts(page, ".row")) < 30


def test_search_and_filters_find_what_they_say(page, plain):
    page.open(plain, READY)
    fill(page, "q", "WHALES")
    assert count(page) == "5 of 60 prompts, 5 thoughts"
    assert chosen(page) == "thought 2 of whales"
    fill(page, "step", "3")
    assert count(page) == "1 of 60 prompts, 1 thoughts"
    page.ask("document.querySelector('[data-part=clear]').click()")
    assert count(page) == "60 of 60 prompts, 180 thoughts"
    fill(page, "q", "d11")
    assert count(page) == "5 of 60 prompts, 15 thoughts"
    fill(page, "q", "held out 3")
    assert count(page) == "5 of 60 prompts, 15 thoughts"
    fill(page, "q", "")
    fill(page, "domain", "sea")
    fill(page, "finish", "budget")
    assert count(page) == "30 of 60 prompts, 30 thoughts"
    # Rewards of first thoughts in the sea are 10 (-0.1 + n / 100): n = 9 and 11 lie above -0.2.
    fill(page, "low", "-0.2")
    assert count(page) == "10 of 60 prompts, 10 thoughts"
    fill(page, "high", "-0.2")
    assert count(page) == "0 of 60 prompts, 0 thoughts"
    assert "No thought is like that" in texts(page, ".detail")[0]
    assert page.said == []


@pytest.mark.parametrize(
    ("order", "prompts", "first", "thought"),
    [
        ("best", 60, " held out 11", "thought 2 of ships"),
        ("worst", 60, " held out 0", "thought 0 of ships"),
        ("each-best", 5, " held out 11", "thought 2 of ships"),
        ("each-worst", 5, " held out 0", "thought 0 of ships"),
    ],
)
def test_best_and_worst_come_first(page, plain, order, prompts, first, thought):
    page.open(plain + f"#order={order}", READY)
    assert count(page).startswith(f"{prompts} of 60")
    assert texts(page, ".context mark") == [first]
    assert chosen(page) == thought


def test_the_median_of_a_step_has_as_many_above_as_below(page, plain):
    """36 thoughts a step with gains (g - 1) / 10 + n / 100; the 18th from above is 0.06 or close by."""
    page.open(plain + "#order=each-median", READY)
    gains = sorted(((g - 1) * 0.1 + n / 100 for g in range(3) for n in range(12)), reverse=True)
    shown = page.ask("document.querySelector('[data-chosen] b').textContent")
    assert float(shown.split()[1].replace(MINUS, "-")) == pytest.approx(gains[17], abs=6e-4)


def test_keys_move_between_prompts_and_thoughts(page, plain):
    page.open(plain, READY)
    for key in ("j", "j", "k"):
        page.press(key)
    assert texts(page, ".context mark") == [" held out 1"]
    page.press("ArrowRight")
    assert chosen(page) == "thought 1 of ships"
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert chosen(page) == "thought 2 of ships"
    page.press("/")
    assert page.ask("document.activeElement.name") == "q"
    for key in "whales":
        page.press(key)
    assert count(page) == "5 of 60 prompts, 5 thoughts"
    page.press("Escape")
    assert count(page) == "60 of 60 prompts, 180 thoughts"
    page.press("?")
    assert page.ask("document.getElementById('help').open")


def test_a_link_leads_to_one_thought_and_the_address_follows(page, plain):
    page.open(plain + "#at=0%2F4%2Fd9%2F9&thought=2", READY)
    assert texts(page, ".context mark") == [" held out 9"]
    assert chosen(page) == "thought 1 of ships"
    page.press("j")
    page.wait("location.hash.includes('d10')")
    assert "thought=1" in page.ask("location.hash")


def test_tokens_say_their_probabilities_and_wear_their_gain(page, plain):
    page.open(plain + "#at=0%2F1%2Fd5%2F5", READY)
    # exp(-2) = 0.135 and exp(-2 + 0.15) = 0.157.
    first = page.ask("document.querySelector('[data-chosen] .t').title")
    assert first == "p 0.135 \N{RIGHTWARDS ARROW} 0.157 (+0.150 nats)"
    kinds = page.ask("[...document.querySelectorAll('.one .t:first-child')].map(e => e.className)")
    assert [kind.split()[1] for kind in kinds] == ["up", "up", "down"]
    strengths = page.ask(
        "[...document.querySelectorAll('.one .t:first-child')].map(e => +e.style.getPropertyValue('--s'))"
    )
    # The square root of 0.15, 0.05 and 0.05 over the least scale, 0.25 nats.
    assert strengths == [0.77, 0.45, 0.45]


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_the_web_that_holds_a_script_is_shown_and_not_run(page, folder, make_run):
    run = make_run(folder / "hostile", HOSTILE)
    page.open(write([run]).as_uri(), READY)
    page.ask("new Promise(done => setTimeout(done, 100))")
    assert page.ask("window.ran ?? 'nothing'") == "nothing"
    assert HOSTILE in texts(page, ".context mark")[0]
    assert HOSTILE in texts(page, "title")[0] or HOSTILE in texts(page, ".where")[0]
    assert page.ask("document.querySelectorAll('script').length") == 2
    assert page.ask("document.querySelectorAll('img').length") == 0
    assert page.said == []


def test_the_security_policy_refuses_any_other_script(page, plain):
    """Were something to slip through the escaping, it would still not run."""
    page.open(plain, READY)
    page.ask(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); })()"
    )
    assert page.ask("window.ran ?? 'nothing'") == "nothing"
    assert any("Content Security Policy" in line for line in page.said)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(page, folder, make_run, plain, width):
    runs = [make_run(folder / f"wide{width}" / name) for name in ("one_name", "another_name")]
    page.size(width, 800, mobile=width < 400)
    for address in (plain, write(runs).as_uri()):
        page.open(address, READY)
        assert page.ask("document.documentElement.scrollWidth") <= width


def test_both_themes_and_the_switch(page, plain):
    def paper():
        return page.ask("getComputedStyle(document.body).backgroundColor")

    page.open(plain)
    page.ask("localStorage.clear()")
    seen = {}
    for theme in ("light", "dark"):
        page.theme(theme)
        page.open(plain, READY)
        seen[theme] = paper()
    assert seen["light"] != seen["dark"]
    page.ask("document.getElementById('theme').click()")
    assert paper() == seen["light"]
    page.ask("document.getElementById('theme').click()")
    assert paper() == seen["dark"]
    assert "dark" in page.ask("document.getElementById('theme').getAttribute('aria-label')")


def test_what_has_the_focus_can_be_seen(page, plain):
    page.open(plain, READY)
    page.press("/")
    style = page.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"
    unnamed = page.ask(
        "[...document.querySelectorAll('button, input, select, [tabindex]')].filter(e =>"
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.usefixtures("undrawn")
def test_the_same_prompt_of_another_run_is_one_step_away(page, folder, make_run):
    runs = [make_run(folder / "pair" / name) for name in ("here", "there")]
    page.open(write(runs).as_uri(), READY)
    assert texts(page, ".others button") == ["there +0.167"]
    page.ask("document.querySelector('.others button').click()")
    assert texts(page, ".where")[0].startswith("there")


def test_a_browser_that_cannot_unpack_says_so(browser, plain):
    page = browser.page()
    page.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    page.open(plain, "document.querySelector('[data-part=count]').textContent.includes('cannot')")
    assert "cannot unpack the rollouts" in count(page)


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_dumps_opens_too(page, folder, make_run):
    run = make_run(folder / "bare")
    for path in (run / "rollouts").iterdir():
        path.unlink()
    page.open(write([run]).as_uri())
    before = page.ask("document.documentElement.dataset.theme")
    page.ask("document.getElementById('theme').click()")
    assert page.ask("document.documentElement.dataset.theme") != before
    assert page.said == []
