"""Proof without a GPU: every shipped launch is compiled ahead of time, and what the compiler made of it is read.

In: the launches of `shipped`. Out: a `Record` of each, and `problems` in words. The rule: a launch is compiled at sizes
that are multiples of 16 and at sizes that are not, and the worse of the two counts.

    python -m rlpt_kernels.aot [--json] [--chip sm_90 ..] [--only 'sm_90 scan * bf16' ..]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlpt_kernels.launch import interpreted
from rlpt_kernels.shipped import CHIPS, SHIPPED, SIZES, TILED, Case, Chip, Launch, cases, launch


@dataclass(frozen=True)
class Record:
    """What the compiler made of one launch."""

    chip: str
    kernel: str
    features: str
    dtype: str
    tile: str
    """Rows x ids x width of a step of the main loop; of a row kernel, its block."""
    warps: int
    stages: int
    registers: int
    """Of a thread."""
    spill_bytes: int
    """Stack of a thread: registers that did not fit."""
    shared_bytes: int
    """Of a block."""
    tensor_columns: int
    """Tensor memory of a block, where the chip has it."""
    tma: bool
    """Whether the operands are given by descriptor."""
    tma_copies: int
    """Bulk copies into shared memory, before the main loop and in it."""
    ahead: int
    """Steps whose loads are under way when the main loop starts; 0 if it issues none before its epilogue."""
    pendings: int
    """Matmuls still running when the main loop issues its loads (wgmma alone counts them)."""
    tensor_core: str
    """The matmul instruction; empty where there is none."""

    @property
    def pipelined(self) -> bool:
        """Loads run ahead of the matmul, and those of the next tile are issued before this one's epilogue."""
        return self.ahead > 0


def measured(case: Case) -> Record:
    """The case compiled at both sizes: the worse of each number."""
    records = [_read(case, launch(case, sizes)) for sizes in SIZES]
    least = ("tma", "tma_copies", "ahead", "pendings", "tensor_core")
    values = {
        field.name: (min if field.name in least else max)(getattr(x, field.name) for x in records)
        for field in fields(Record)
    }
    return Record(**values)


def _read(case: Case, called: Launch) -> Record:
    compiled = _compiled(called, CHIPS[case.chip].capability)
    registers, spill_bytes = _resources(compiled.asm["cubin"])
    copies, ahead, pendings = schedule(compiled.asm["ttgir"])
    found = re.search(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", compiled.asm["ptx"])
    settings, metadata = called.settings, compiled.metadata
    shape = [
        settings[name] for name in ("BM", "BN", "BK", "ROWS", "TILES", "BLOCK") if name in settings
    ]
    return Record(
        **asdict(case), tile="x".join(map(str, shape)), warps=metadata.num_warps, stages=metadata.num_stages,
        registers=registers, spill_bytes=spill_bytes, shared_bytes=metadata.shared,
        tensor_columns=metadata.tmem_size or 0, tma=settings.get("TMA", False), tma_copies=copies,
        ahead=ahead, pendings=pendings, tensor_core=found[0] if found else "",
    )  # fmt: skip


def _compiled(called: Launch, capability: int) -> Any:
    """What Triton does at a first launch, but for a chip that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = called.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, options = bind(*called.args, **called.settings)
    options, *parts = kernel._pack_args(backend, called.settings, bound, special, options)
    return triton.compile(ASTSource(kernel, *parts), target=target, options=options.__dict__)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the disassembler that comes with Triton tells them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def _cuobjdump() -> Path:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise SystemExit(
            f"aot: triton {triton.__version__} came without cuobjdump; pip install triton==3.7.1"
        )
    return tool


def schedule(ttgir: str) -> tuple[int, int, int]:
    """(bulk copies, steps loaded ahead, matmuls pending at the loads) of a kernel's first loop.

    A step's loads are the copies between the top of the loop and its first branch, the epilogue; as many times as they
    stand before the loop, so many steps does it run ahead. A loop that copies what it then waits for has none there.
    """
    copy = r"async_(?:tma_)?copy_global_to_local"
    before, _, loop = ttgir.partition("scf.for")
    step = loop.partition("scf.if")[0]
    waits = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", step)
    each = len(re.findall(copy, step))
    ahead = len(re.findall(copy, before)) // each if each else 0
    return ttgir.count("async_tma_copy_global_to_local"), ahead, min(map(int, waits), default=0)


def problems(record: Record) -> list[str]:
    """What is wrong with a record, in words."""
    chip = CHIPS[record.chip]
    checks = {
        f"{record.spill_bytes} bytes of registers spill": record.spill_bytes > 0,
        f"{record.registers} registers; a thread has {chip.registers}": record.registers > chip.registers,
        f"{record.shared_bytes} bytes of shared memory; a block has {chip.shared_bytes}":
            record.shared_bytes > chip.shared_bytes,
        f"{record.tensor_columns} columns of tensor memory; there are {chip.tensor_columns}":
            record.tensor_columns > chip.tensor_columns,
    }  # fmt: skip
    return [words for words, wrong in checks.items() if wrong] + _tile_problems(record, chip)


def _tile_problems(record: Record, chip: Chip) -> list[str]:
    if record.kernel not in TILED:
        return []
    half, bulk = record.dtype != "fp32", chip.capability >= 90
    unit, wgmma = chip.tensor_core, chip.tensor_core.startswith("wgmma")
    checks = {
        "loads are not bulk copies (TMA)": bulk and not (record.tma and record.tma_copies),
        "loads are not issued ahead of the matmul": not record.pipelined,
        f"the matmul is {record.tensor_core or 'scalar'}, not {unit}": half and not record.tensor_core.startswith(unit),
        "no matmul runs while loads are issued": half and wgmma and not record.pendings,
    }  # fmt: skip
    return [words for words, wrong in checks.items() if wrong]


def table(records: list[Record]) -> str:
    """One line a record, columns aligned."""
    names = [field.name for field in fields(Record)]
    rows = [names, *([str(value) for value in asdict(record).values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing is wrong, 1 otherwise."""
    parser = argparse.ArgumentParser("python -m rlpt_kernels.aot")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=SHIPPED)
    parser.add_argument("--only", nargs="+", metavar="'CHIP KERNEL FEATURES DTYPE'", default="*")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if interpreted():
        raise SystemExit(
            "aot: TRITON_INTERPRET is set: nothing is compiled; unset it and run again"
        )
    chosen = [x for x in cases(options.chip) if any(fnmatch(x.name, y) for y in options.only)]
    if not chosen:
        raise SystemExit(
            f"aot: no launch is called {options.only}; see the first columns without --only"
        )
    records = {case.name: measured(case) for case in chosen}
    wrong = {name: found for name, record in records.items() if (found := problems(record))}
    if options.json:
        found = {"records": [asdict(x) for x in records.values()], "problems": wrong}
        print(json.dumps(found, indent=1))
    else:
        print(table(list(records.values())))
        print(*(f"{name}: {'; '.join(found)}" for name, found in wrong.items()), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
