"""The benchmark measures what it says: every implementation, its error, its memory, and ratios within rounds."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
OURS = {
    "reference",
    "slabs",
    "slabs_bf16",
    "chunked",
    "triton",
    "policy_one_pass",
    "policy_recompute",
}
PEERS = {"naive", "linear_cross_entropy", "liger_kernel", "cut_cross_entropy", "policy_naive"}
MIB = 2**20


@pytest.fixture(scope="module")
def quick():
    """One tiny run of the command: (its output, rows, reasons)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(BENCH / "linear_logprob.py"),
        "--quick",
        "--json",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return done.stdout, found["results"], found["not_measured"]


@pytest.fixture
def sibling(monkeypatch):
    """A module of the bench, imported as the script imports it."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in ("linear_logprob", "measure", "methods"):
        sys.modules.pop(name, None)


def of(rows, method, dtype="bfloat16"):
    (found,) = [row for row in rows if (row["method"], row["dtype"]) == (method, dtype)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_implementation_and_every_peer_is_measured_or_named_with_a_reason(quick, dtype):
    printed, rows, missing = quick
    measured = {row["method"] for row in rows if row["dtype"] == dtype}
    reasons = {row["method"]: row["reason"] for row in missing if row["dtype"] == dtype}
    assert measured | reasons.keys() >= OURS | PEERS
    assert not measured & reasons.keys()
    assert measured >= OURS - {"triton"}
    for method, reason in reasons.items():
        assert f"not measured: {method}: {reason}" in printed


@pytest.mark.slow
def test_exact_methods_are_exact_and_rounded_ones_are_seen_to_be_wrong(quick):
    _, rows, _ = quick
    exact = ("naive_upcast", "reference", "slabs", "chunked", "policy_one_pass", "policy_recompute")
    worst = max(of(rows, name)["max_error"] for name in exact)
    assert worst <= 5e-5
    for name in ("naive", "slabs_bf16"):
        assert of(rows, name)["max_error"] > 100 * worst
    for row in rows:
        # dH of bfloat16 inputs is rounded to 8 bits.
        bar = 1e-5 if row["dtype"] == "float32" and row["method"] != "slabs_bf16" else 1e-2
        assert row["rms_error"] <= row["max_error"]
        assert 0 < row["gradient_error"] < bar, row["method"]


@pytest.mark.slow
def test_figures_of_a_row_agree_with_each_other(quick):
    _, rows, _ = quick
    for row in rows:
        products = row["N"] * row["D"] * row["V"]
        for name, count in (("forward", 2), ("forward_backward", 6)):
            tflops = count * products / row[f"{name}_ms"] / 1e9
            assert row[f"{name}_tflops"] == pytest.approx(tflops, rel=1e-2)
            assert row[f"{name}_min_ms"] <= row[f"{name}_ms"]
            share = row[f"{name}_extra_mib"] * MIB / (4 * row["N"] * row["V"])
            assert row[f"{name}_extra_of_logits"] == pytest.approx(share, rel=1e-2)
        if row["method"] in ("naive", "policy_naive"):
            assert row["forward_over_naive"] == row["forward_backward_over_naive"] == 1


@torch.library.custom_op("rlpt_test::scratch", mutates_args=())
def scratch(value: torch.Tensor) -> torch.Tensor:
    """Holds 2 + 1 MiB, then 1 + 2: 3 at a time, 5 in all."""
    first = torch.empty(2 * MIB, dtype=torch.uint8)
    kept = torch.empty(MIB, dtype=torch.uint8)
    del first
    second = torch.empty(2 * MIB, dtype=torch.uint8)
    del second
    del kept
    return value.clone()


def test_the_memory_meter_sees_the_peak_inside_a_custom_operator(sibling):
    value = torch.zeros(10)
    before = torch.ones(4 * MIB, dtype=torch.uint8)
    peak = sibling("measure").peak_bytes(lambda: scratch(value), torch.device("cpu"))
    assert 3 * MIB <= peak < 3 * MIB + 1000
    del before


def test_gradients_and_inputs_are_not_extra_memory(sibling):
    measure, methods = sibling("measure"), sibling("methods")
    shape = methods.Shape(64, 256, 1024)
    data = methods.random_data(shape, torch.float32, torch.device("cpu"))

    def bare(data):
        logp_N = (data.hidden_ND[:, :1] * data.weight_VD[0, 0])[:, 0]
        return methods.Scored(logp_N, methods.weighted_loss(logp_N, data))

    extra = measure.extra_bytes(methods.Method("bare", bare), data)
    # No more than a temporary of hidden's and one of weight's size, which autograd's slices make.
    assert extra["forward"] < 4096
    assert 0 <= extra["forward_backward"] < data.hidden_ND.nbytes + 4096
    (naive,) = [method for method in methods.METHODS if method.name == "naive"]
    logits = 4 * shape.N * shape.V
    # The logits and their log-softmax.
    assert 2 * logits <= measure.extra_bytes(naive, data)["forward"] < 2 * logits + 4096


def test_a_ratio_is_the_median_of_the_ratios_within_rounds(sibling):
    ratio = sibling("measure").ratio
    # The machine slows down by ten: medians of each side would give 20 / 20 = 1.
    assert ratio([1.0, 20.0, 30.0], [2.0, 20.0, 60.0]) == 0.5
    assert ratio([1.0], None) is None


def test_every_method_runs_once_a_round_and_the_order_rotates(sibling):
    measure, methods = sibling("measure"), sibling("methods")
    data = methods.random_data(methods.Shape(4, 8, 16), torch.float32, torch.device("cpu"))
    calls = []

    def called(name):
        def call(data):
            calls.append((name, torch.is_grad_enabled()))
            loss = data.hidden_ND.sum() + data.weight_VD.sum()
            return methods.Scored(data.advantage_N, loss)

        return methods.Method(name, call)

    times = measure.timed([called("a"), called("b")], data, 2)
    assert calls == [(name, grad) for name in "abba" for grad in (False, True)]
    assert [len(times.of["forward"][name]) for name in "ab"] == [2, 2]
    assert len(times.matmul) == 2


def test_a_failing_peer_is_reported_and_a_failure_of_ours_is_not_hidden(sibling):
    measure, methods = sibling("measure"), sibling("methods")
    data = methods.random_data(methods.Shape(4, 8, 16), torch.float32, torch.device("cpu"))

    def broken(data):
        raise RuntimeError("no such kernel\nand more")

    rows, reasons = measure.measured((methods.Method("peer", broken, foreign=True),), data, 1)
    assert (rows, reasons) == ([], {"peer": "RuntimeError: no such kernel"})
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure.measured((methods.Method("ours", broken),), data, 1)


def test_results_are_appended_one_object_a_line(sibling, tmp_path, monkeypatch):
    bench = sibling("linear_logprob")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.json")
    bench.write([{"method": "a"}])
    bench.write([{"method": "b"}, {"method": "c"}])
    text = bench.RESULTS.read_text()
    assert [row["method"] for row in json.loads(text)] == ["a", "b", "c"]
    assert text.splitlines() == [
        "[",
        '{"method": "a"},',
        '{"method": "b"},',
        '{"method": "c"}',
        "]",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_shape_that_is_none_is_refused_in_one_line(sibling, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linear_logprob.py", "--shape", "2048,512"])
    with pytest.raises(SystemExit):
        sibling("linear_logprob").arguments()
    assert "'2048,512' is not N,D,V, such as 2048,512,32000" in capsys.readouterr().err
