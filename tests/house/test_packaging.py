"""What is installed is what was tested, and what the documents name exists."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlpt.cli import cli, data

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "launch/README.md", "configs/README.md"]


def test_constraints_are_public_versions_only() -> None:
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


@pytest.mark.parametrize("extra", ["", "data", "report", "dev"])
def test_the_tested_versions_lie_inside_the_declared_windows(extra: str) -> None:
    tested = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in CONSTRAINTS}
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in map(Requirement, lines):
        version = tested[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_file_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^\s*|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert target in targets, f"make {target}"
    for words in re.findall(r"(?:^\s*|`)rlpt ((?:data )?[a-z-]+)", text, re.MULTILINE):
        group, name = (data, words.split()[1]) if words.startswith("data ") else (cli, words)
        assert name in group.commands, f"rlpt {words}"
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(path).exists(), path


def test_the_version_is_in_the_changelog() -> None:
    import rlpt

    assert f"## {rlpt.__version__}" in (ROOT / "CHANGELOG.md").read_text()
