"""Every import contract has a planted violation, and breaks on it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# contract id -> (file, statement): planted into a copy of the tree, where the contract must break.
PLANTED = {
    "layers": ("rlpt/types.py", "import rlpt.config"),
    "arithmetic": ("rlpt/advantage.py", "import rlpt.dist"),
    "data": ("data/rlpt_data/documents.py", "import torch"),
    "kernels": ("kernels/rlpt_kernels/__init__.py", "import rlpt.types"),
    "shards": ("rlpt/prompts.py", "import rlpt_data.documents"),
    "corpora": ("rlpt/dist.py", "import datatrove"),
    "vllm": ("rlpt/prompts.py", "import vllm"),
    "wandb": ("rlpt/rng.py", "import wandb"),
    "lm_eval": ("rlpt/rng.py", "import lm_eval"),
    "logprobs": ("rlpt/cli.py", "import rlpt_kernels"),
    "config": ("rlpt/exits.py", "import torch"),
}
ALLOWED_IN_KERNELS = {"torch", "triton", "numpy", "jaxtyping", "rlpt_kernels"}


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(tree / part) for part in ("", "data", "kernels"))
    program = "import sys; from importlinter.cli import lint_imports_command as lint; lint()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_of_the_tree(folder: Path) -> Path:
    for package in ("rlpt", "data", "kernels"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def names_by_id() -> dict[str, str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {contract["id"]: contract["name"] for contract in settings["contracts"]}


@pytest.fixture(scope="module")
def output_with_violations(tmp_path_factory: pytest.TempPathFactory) -> str:
    tree = copy_of_the_tree(tmp_path_factory.mktemp("planted"))
    for path, statement in PLANTED.values():
        with (tree / path).open("a") as file:
            file.write(f"\n{statement}\n")
    (tree / "rlpt" / "utils.py").write_text('"""A module without a layer."""\n')
    return lint_imports(tree).stdout


def test_every_contract_has_a_planted_violation() -> None:
    assert set(PLANTED) == set(names_by_id())


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_violation_breaks_the_contract_meant_for_it(
    contract: str, output_with_violations: str
) -> None:
    name = re.escape(names_by_id()[contract])
    assert re.search(rf"^{name} BROKEN", output_with_violations, re.MULTILINE)
    path, statement = PLANTED[contract]
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = module.removeprefix("data.").removeprefix("kernels.")
    imported = statement.removeprefix("import ")
    assert f"{module} -> {imported}" in output_with_violations


def test_a_module_without_a_layer_is_named(output_with_violations: str) -> None:
    assert "utils" in output_with_violations


def test_the_tree_as_it_is_keeps_every_contract(tmp_path: Path) -> None:
    found = lint_imports(copy_of_the_tree(tmp_path))
    assert found.returncode == 0, found.stdout
    assert f"{len(PLANTED)} kept, 0 broken" in found.stdout


def test_kernels_import_only_torch_triton_and_numpy() -> None:
    allowed = ALLOWED_IN_KERNELS | sys.stdlib_module_names
    for path in (ROOT / "kernels" / "rlpt_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path}: {names}"
