"""The house rules that no linter knows: sizes, names, places."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "rlpt", ROOT / "kernels" / "rlpt_kernels", ROOT / "data" / "rlpt_data")
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FILE_CAP, FUNCTION_CAP, SHELL_CAP = 350, 50, 40


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of code: what a docstring explains is not to be cut short."""
    assert node.end_lineno is not None
    told = node.body[0] if ast.get_docstring(node) else None
    explained = 0 if told is None else (told.end_lineno or 0) - told.lineno + 1
    return node.end_lineno - node.lineno + 1 - explained


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_is_short_made_of_short_functions_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= FILE_CAP, "split the file or defend it in review"
    long = {
        node.name: num_lines(node) for node in functions(tree) if num_lines(node) > FUNCTION_CAP
    }
    assert not long, "split the function or defend it in review"
    assert ast.get_docstring(tree), "the module does not say what flows in and out"


def test_functions_are_about_ten_lines_long() -> None:
    lengths = sorted(
        num_lines(node) for path in SOURCES for node in functions(ast.parse(path.read_text()))
    )
    assert lengths[len(lengths) // 2] <= 12


def test_annotations_are_real_objects_for_jaxtyping() -> None:
    # `from __future__ import annotations` can make jaxtyping skip the check of a dataclass.
    for path in SOURCES + TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.module == "__future__"), path


def test_folders_that_hold_a_package_are_none_themselves() -> None:
    # `kernels` is also a package of Hugging Face's, which transformers imports when it finds one.
    for folder in ("kernels", "data", "configs", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc"])
def test_no_file_is_named_after_nothing(name: str) -> None:
    assert not [path for path in SOURCES if path.stem == name]


def test_configs_are_toml_and_launch_scripts_are_short_shell() -> None:
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert {path.suffix for path in configs} <= {".toml", ".md"}
    for script in (ROOT / "launch").glob("*.s*"):
        assert script.read_text().count("\n") < SHELL_CAP, script
