"""A mistake in a configuration is one line: where, what, remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
import pytest

from rlpt_data.strict import Strict, UserError, json_of, load, parse


class Sweep(Strict):
    kind: Literal["sweep"]
    steps: int = 3
    """How many."""


class Walk(Strict):
    kind: Literal["walk"]
    rate: float
    path: Path = Path("here")


Stage = Annotated[Sweep | Walk, pydantic.Field(discriminator="kind")]


class Job(Strict):
    seed: int = 0
    name: str = "job"
    share: float = 0.5
    stage: tuple[Stage, ...] = ()
    first: Stage = Sweep(kind="sweep")

    @pydantic.model_validator(mode="after")
    def _positive(self) -> "Job":
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: must be >= 0; give 0")
        return self


Loader = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path) -> Loader:
    def make(toml: str = "", *overrides: str) -> Job:
        path = tmp_path / "job.toml"
        path.write_text(toml)
        return load(Job, path, overrides)

    return make


TWO_STAGES = '[[stage]]\nkind = "sweep"\n[[stage]]\nkind = "walk"\nrate = 1\n'


def test_values_keep_their_types_and_nothing_is_coerced(job: Loader) -> None:
    read = job('seed = 4\nshare = 1\n[first]\nkind = "walk"\nrate = 0.25\npath = "a/b"')
    assert (read.seed, read.share) == (4, 1.0)
    assert read.first == Walk(kind="walk", rate=0.25, path=Path("a/b"))
    for text in ('seed = "4"', "seed = 4.0", "seed = true", "name = 4", 'share = "1"'):
        with pytest.raises(UserError, match=text.split()[0]):
            job(text)


def test_models_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Job().seed = 1  # pyright: ignore


@pytest.mark.parametrize(
    ("toml", "override", "expected"),
    [
        ("sede = 1", "", "job.toml: unknown key 'sede' for Job; did you mean 'seed'?"),
        (
            '[first]\nkind = "sweep"\nstpes = 1',
            "",
            "job.toml, [first]: unknown key 'stpes' for Sweep; did you mean 'steps'?",
        ),
        (
            '[[stage]]\nkind = "sweep"\n[[stage]]\nkind = "walk"\nrat = 1',
            "",
            "job.toml, [stage.1]: unknown key 'rat' for Walk; did you mean 'rate'?",
        ),
        (
            '[first]\nkind = "sweep"',
            "first.stpes=1",
            "--set first.stpes=1: unknown key 'stpes' for Sweep",
        ),
        ('[first]\nkind = "swep"', "", "kind = 'swep' is unknown; did you mean 'sweep'?"),
        ("[first]\nsteps = 1", "", "job.toml, [first]: key 'kind' is missing; valid: sweep, walk"),
        ("[[stage]]", "", "job.toml, [stage.0]: key 'kind' is missing; valid: sweep, walk"),
        ('[first]\nkind = "walk"', "", "[first]: key 'rate' of Walk is missing; add it"),
        (
            '[first]\nkind = "sweep"\nsteps = "7"',
            "",
            '[first]: steps = "7": input should be a valid integer; correct it (How many.)',
        ),
        ("seed = -1", "", "job.toml: seed = -1: must be >= 0; give 0"),
        ("seed == 1", "", "job.toml: not valid TOML"),
        (
            TWO_STAGES,
            "stage.2.rate=1",
            "--set stage.2.rate=1: '2' is not an index; use one of 0..1",
        ),
        ("seed = 1", "seed.x=1", "--set seed.x=1: 'seed' is a value, not a table"),
        ("", "seed", "--set seed: not of the form key.key=value"),
        ("", 'name="a', "not a TOML value"),
    ],
)
def test_a_mistake_is_one_line_naming_place_value_and_remedy(
    job: Loader, toml: str, override: str, expected: str
) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        job(toml, *([override] if override else []))
    assert "\n" not in str(caught.value)


def test_overrides_are_toml_values_bare_words_and_list_indices(job: Loader) -> None:
    read = job(
        TWO_STAGES,
        "seed=7",
        "share=1e-2",
        "name=runs/x-1",
        "stage.1.rate=2.5",
        "stage.0.steps=9",
        'first={kind="walk", rate=1.0}',
    )
    assert (read.seed, read.share, read.name) == (7, 0.01, "runs/x-1")
    assert read.stage == (Sweep(kind="sweep", steps=9), Walk(kind="walk", rate=2.5))
    assert read.first == Walk(kind="walk", rate=1.0)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("")
    with pytest.raises(UserError, match=r"smal\.toml: no such file; did you mean 'small\.toml'"):
        load(Job, tmp_path / "smal.toml")


def test_parse_names_where_the_table_came_from() -> None:
    assert parse(Job, {"seed": 2}, "elsewhere").seed == 2
    with pytest.raises(UserError, match=r"^elsewhere: unknown key 'x' for Job"):
        parse(Job, {"x": 2}, "elsewhere")


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "9" * 5000,
        "stage = " + "[" * 5000,
        ".".join("a" * 5000) + " = 1",
        "first." + ".".join("a" * 300) + " = 1",
    ],
    ids=["digits", "lists", "tables", "levels"],
)
def test_numbers_and_tables_without_end_are_mistakes(job: Loader, text: str) -> None:
    with pytest.raises(UserError, match=r"job\.toml"):
        job(text)
    with pytest.raises(UserError, match=r"job\.toml|--set"):
        job(TWO_STAGES, text.replace(" = ", "="))


def test_an_index_of_thousands_of_digits_is_none(job: Loader) -> None:
    with pytest.raises(UserError, match=r"--set stage\.9+=1: '9+' is not an index; use one of"):
        job(TWO_STAGES, f"stage.{'9' * 5000}=1")


def test_json_of_ours_reads_back_bit_for_bit_and_refuses_the_rest() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64).view(np.float64)
    written = json.dumps(numbers.tolist())
    # NaN is a number here; its bits are no part of the text.
    assert np.array_equal(json_of(written), numbers, equal_nan=True)
    for text in ("[" * 202 + "]" * 202, "[" * 100_000, '"\\ud800"', "9" * 5000, "1 2", ""):
        with pytest.raises(ValueError, match="line 1"):
            json_of(text)


class Choice(Strict):
    stage: Stage | None = None


def test_a_table_without_its_kind_is_told_the_kinds_where_it_may_be_absent_too() -> None:
    with pytest.raises(UserError, match=r"key 'kind' is missing; valid: sweep, walk"):
        parse(Choice, {"stage": {"rate": 1.0}}, "x.toml")
