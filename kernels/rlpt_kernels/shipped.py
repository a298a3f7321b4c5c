"""Every shipped launch of every kernel, without a GPU: the launch code runs on small CPU tensors and is recorded.

In: a `Case`, named by chip, kernel, features and dtype. Out: the `Launch`, with the types, alignments, tiles and
warps of a real one. The rule: nothing that the launch code decides is restated here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from rlpt_kernels import fused
from rlpt_kernels.head import Head, Needs, Problem, Wanted
from rlpt_kernels.objective import Ratio
from rlpt_kernels.rows import Terms, TritonRows
from rlpt_kernels.softmax import BASE_2, Pull


@dataclass(frozen=True)
class Chip:
    """What one kind of GPU gives a program."""

    capability: int
    shared_bytes: int
    """Shared memory of a block."""
    tensor_core: str
    """The instruction that its tensor cores are fed with."""
    registers: int = 255
    """Of a thread."""
    tensor_columns: int = 512
    """Tensor memory of a multiprocessor."""


CHIPS = {
    "sm_80": Chip(80, 163 * 1024, "mma.sync"),
    "sm_90": Chip(90, 227 * 1024, "wgmma.mma_async"),
    "sm_100": Chip(100, 227 * 1024, "tcgen05.mma"),
    # Compiled when named: the same generations with less shared memory.
    "sm_89": Chip(89, 99 * 1024, "mma.sync"),
    "sm_120": Chip(120, 99 * 1024, "mma.sync"),
}
SHIPPED = ("sm_80", "sm_90", "sm_100")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EVERYTHING = "bias+softcap+banned+entropy+argmax"
KERNELS = {
    "scan": (
        "plain", "banned", "bias", "bias+banned", "softcap+banned", "entropy+argmax",
        "banned+entropy+argmax", "bias+banned+entropy+argmax", EVERYTHING,
    ),
    "count": ("plain", "banned", "bias+banned", EVERYTHING),
    "pull": ("plain", "entropy", "bias", "softcap+entropy", EVERYTHING),
    "combine": ("plain", "entropy+argmax"),
    "scan_rows": ("plain", "entropy", EVERYTHING),
    "pull_rows": ("plain", "entropy", EVERYTHING),
    "policy_rows": ("plain", "entropy", EVERYTHING),
}  # fmt: skip
"""With which features; what spills is not always what does most."""
TILED = ("scan", "count", "pull")
"""Those with a matmul in their main loop."""


@dataclass(frozen=True)
class Case:
    """One launch, by the names of its parts."""

    chip: str
    kernel: str
    features: str
    dtype: str

    @property
    def name(self) -> str:
        """What `--only` is matched against."""
        return " ".join((self.chip, self.kernel, self.features, self.dtype))

    def has(self, feature: str) -> bool:
        """Whether the launch asks for it."""
        return feature in self.features.split("+")


SIZES = ((32, 512, 64), (33, 777, 64))
"""Rows, ids and width: multiples of 16, and as few of them as there can be. The launch code pads the width."""


def cases(chips: Sequence[str] = SHIPPED) -> Iterator[Case]:
    """Every shipped configuration of every kernel."""
    for chip in chips:
        for kernel, features in KERNELS.items():
            for dtype in DTYPES if kernel in TILED else ("bf16", "fp16"):
                yield from (Case(chip, kernel, feature, dtype) for feature in features)


@dataclass(frozen=True)
class Launch:
    """What a kernel would have been called with."""

    kernel: Any
    args: tuple[Any, ...]
    settings: dict[str, Any]


def launch(case: Case, sizes: tuple[int, int, int]) -> Launch:
    """What the launch code hands to the case's kernel on its chip."""
    wanted = "scan_kernel" if case.kernel == "count" else f"{case.kernel}_kernel"
    with _recording(CHIPS[case.chip].capability) as launches:
        _operate(case, _problem(case, *sizes))
    return next(found for found in launches if found.kernel.__name__ == wanted)


@contextmanager
def _recording(capability: int) -> Iterator[list[Launch]]:
    """CPU tensors play the part of a chip's own, and kernels are noted instead of launched."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        launches.append(Launch(kernel, args, settings))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(fused, "capability", lambda device: capability),
        patch.object(Problem, "operand_dtype", property(lambda self: self.hidden_ND.dtype)),
    ):
        yield launches


def _problem(case: Case, rows: int, vocab: int, width: int) -> Problem:
    hidden_ND = torch.zeros(rows, width, dtype=DTYPES[case.dtype])
    weight_VD = torch.zeros(vocab, width, dtype=DTYPES[case.dtype])
    # A caller's own slice of targets may start anywhere.
    target_N = torch.zeros(rows + 1, dtype=torch.long)[rows % 2 :][:rows]
    banned, softcap = (1, 40) if case.has("banned") else (), 30.0 if case.has("softcap") else None
    head = Head.of(1.0, softcap, banned, hidden_ND.device)
    bias_V = torch.zeros(vocab) if case.has("bias") else None
    return Problem(hidden_ND, weight_VD, bias_V, target_N, head)


def _operate(case: Case, problem: Problem) -> None:
    """The call that launches the case's kernel."""
    rows, vocab = len(problem.target_N), len(problem.weight_VD)
    zero_N, raw_NV = torch.zeros(rows), torch.zeros(rows, vocab)
    entropy = case.has("entropy")
    wanted = Wanted(entropy=entropy, argmax=case.has("argmax"))
    pull = Pull(
        problem.target_N, zero_N, zero_N + 1, zero_N, zero_N,
        zero_N if entropy else None, zero_N if entropy else None, BASE_2,
    )  # fmt: skip
    terms = Terms(zero_N, zero_N, zero_N, Ratio("tv" if case.has("bias") else "clip"))
    {
        "scan": lambda: fused.Fused().scan(problem, wanted),
        "combine": lambda: fused.Fused().scan(problem, wanted),
        "count": lambda: fused.Fused().count(problem, zero_N),
        "pull": lambda: fused.Fused().pull(problem, pull, Needs(False, False, False)),
        "scan_rows": lambda: TritonRows().scan(raw_NV, problem, wanted),
        "pull_rows": lambda: TritonRows().pull(raw_NV, problem, pull),
        "policy_rows": lambda: TritonRows().policy(raw_NV, problem, terms, entropy),
    }[case.kernel]()
