"""Kernels are compiled for GPUs that are not here: no spills, bulk copies, loads issued ahead of the matmul."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlpt_kernels import aot
from rlpt_kernels.shipped import CHIPS, KERNELS, SHIPPED, TILED

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on linux only")

FOLDER = Path(__file__).parents[2] / "kernels"
QUICK = (
    "sm_90 scan plain bf16",
    "sm_90 scan banned+entropy+argmax bf16",
    "sm_90 pull plain bf16",
    "sm_80 scan plain bf16",
    "sm_100 pull plain bf16",
)
GOOD = aot.Record(
    "sm_90", "scan", "plain", "bf16", tile="128x256x64", warps=8, stages=4,
    registers=255, spill_bytes=0, shared_bytes=197152, tensor_columns=0, tma=True, tma_copies=8,
    ahead=3, pendings=1, tensor_core="wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16",
)  # fmt: skip


def python(cache, *arguments):
    """Another process: this one interprets its kernels, and what is interpreted cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(FOLDER), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compiled(cache, *arguments):
    done = python(cache, "-m", "rlpt_kernels.aot", "--json", *arguments)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == bool(found["problems"])
    return [aot.Record(**record) for record in found["records"]], found["problems"]


def assert_sound(records):
    """By number, beside `problems`: what is claimed of every shipped configuration."""
    for record in records:
        chip = CHIPS[record.chip]
        assert record.spill_bytes == 0, record
        assert record.registers <= 255, record
        assert record.shared_bytes <= chip.shared_bytes, record
        if record.kernel in TILED:
            assert record.ahead >= 2, record
            assert record.tma == (record.tma_copies >= 2) == (chip.capability >= 90), record


@pytest.mark.slow
def test_shipped_kernels_do_not_spill_and_load_ahead(tmp_path):
    records, wrong = compiled(tmp_path, "--only", *QUICK)
    assert not wrong
    assert len(records) == len(QUICK)
    assert_sound(records)
    hopper = [record for record in records if record.chip == "sm_90"]
    assert all(".f32.bf16.bf16" in record.tensor_core and record.pendings == 1 for record in hopper)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chip", SHIPPED)
def test_every_shipped_configuration_compiles_without_a_problem(chip, tmp_path):
    records, wrong = compiled(tmp_path, "--chip", chip)
    assert not wrong
    assert {record.kernel for record in records} == set(KERNELS)
    assert_sound(records)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers spill"),
        ({"registers": 256}, "256 registers"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory"),
        ({"tensor_columns": 513}, "tensor memory"),
        ({"tma": False}, "TMA"),
        ({"tma_copies": 0}, "TMA"),
        ({"ahead": 0}, "ahead of the matmul"),
        ({"pendings": 0}, "no matmul runs"),
        ({"tensor_core": ""}, "scalar, not wgmma"),
    ],
)
def test_what_is_wrong_with_a_record_is_named(change, words):
    assert aot.problems(GOOD) == []
    found = aot.problems(replace(GOOD, **change))
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.slow
def test_a_tile_that_spills_and_a_loop_without_stages_are_reported(tmp_path):
    script = """if True:
        from rlpt_kernels import aot, tiles
        from rlpt_kernels.shipped import SIZES
        case = aot.Case("sm_90", "scan", "plain", "bf16")
        for warps, stages in ((4, 3), (8, 1)):
            tiles.tile = lambda *_, **__: tiles.Tile(128, 256, 64, warps, stages)
            print(aot.problems(aot._read(case, aot.launch(case, SIZES[0]))))
    """
    spilling, unstaged = python(tmp_path, "-c", script).stdout.splitlines()
    assert "registers spill" in spilling
    assert "not issued ahead" in unstaged


def test_loads_that_are_waited_for_in_their_own_step_do_not_count_as_ahead():
    load, wait = (
        "ttng.async_tma_copy_global_to_local\n",
        "ttng.warp_group_dot_wait %a {pendings = 1 : i32}\n",
    )
    assert aot.schedule(load * 4 + "scf.for\n" + wait + load * 2 + "scf.if\n") == (6, 2, 1)
    assert aot.schedule("scf.for\n" + load * 2 + wait + "scf.if\n") == (2, 0, 1)
    assert aot.schedule(load * 4 + "scf.for\n" + wait + "scf.if\n" + load * 2) == (6, 0, 1)


def test_interpreted_kernels_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(aot, "interpreted", lambda: True)
    with pytest.raises(SystemExit, match=r"TRITON_INTERPRET is set.*unset it"):
        aot.main([])
