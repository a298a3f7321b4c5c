"""One checksum on both sides of a publication: it sees every bit and every place, and nothing else."""

import numpy as np
import pytest
import torch

from rlpt.rollout import checksum as module
from rlpt.rollout.checksum import checksum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GOLDEN = 0x9E3779B97F4A7C15


def bits_of(tensor: torch.Tensor) -> list[int]:
    """Signed bits of every element, by numpy."""
    width = {2: np.int16, 4: np.int32}[tensor.element_size()]
    return [int(x) for x in np.frombuffer(tensor.contiguous().view(torch.uint8).numpy(), width)]


def by_hand(bits: list[int]) -> int:
    """sum of (bits_i + 1) * (2 * golden * i + 1) modulo 2**64, in whole numbers."""
    return sum((b + 1) * (2 * GOLDEN * i + 1) for i, b in enumerate(bits)) % 2**64


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 7), (3, 1, 11)], ids=str)
def test_the_checksum_is_the_sum_it_is_said_to_be(dtype, shape) -> None:
    tensor = drawn(dtype, *shape)
    assert checksum(tensor) == by_hand(bits_of(tensor.reshape(-1)))


def test_it_is_the_sum_by_hand_of_two_numbers() -> None:
    # 1.0 is 0x3F800000, -0.0 is -2**31 as a signed integer.
    expected = (0x3F800000 + 1) + (-(2**31) + 1) * (2 * GOLDEN + 1)
    assert checksum(torch.tensor([1.0, -0.0])) == expected % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_change_of_one_bit_is_seen(dtype) -> None:
    tensor = drawn(dtype, 3, 5)
    known = checksum(tensor)
    whole = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).view(-1)
    width = 8 * tensor.element_size()
    for i in range(len(whole)):
        for bit in range(width):
            # The highest bit is the sign of a signed integer.
            mask = 1 << bit if bit < width - 1 else -(1 << bit)
            whole[i] ^= mask
            assert checksum(tensor) != known, (i, bit)
            whole[i] ^= mask
    assert checksum(tensor) == known


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_swap_of_unequal_elements_is_seen_and_of_equal_ones_is_none(dtype) -> None:
    # With a zero and its negative: they differ in the one bit that shifts furthest.
    values = torch.cat([drawn(dtype, 9), torch.tensor([0.0, -0.0, 1.0, 1.0], dtype=dtype)])
    known, bits = checksum(values), bits_of(values)
    for i in range(len(values)):
        for j in range(i):
            other = values.clone()
            other[[i, j]] = values[[j, i]]
            assert (checksum(other) == known) == (bits[i] == bits[j]), (i, j)


@pytest.mark.parametrize("distance", [1 << 16, 1 << 20])
def test_a_swap_over_a_great_power_of_two_is_seen(distance) -> None:
    tensor = torch.zeros(distance + 1)
    tensor[0] = -0.0
    assert checksum(tensor) != checksum(tensor.flip(0))


@pytest.mark.parametrize("chunk", [1, 2, 7, 34, 35, 36])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_change_it(dtype, chunk, monkeypatch) -> None:
    tensor = drawn(dtype, 5, 7)
    known = checksum(tensor)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert checksum(tensor) == known


def test_the_shape_does_not_matter_and_the_order_does() -> None:
    tensor = drawn(torch.float32, 6, 4)
    assert checksum(tensor) == checksum(tensor.view(3, 8)) == checksum(tensor.reshape(-1))
    assert checksum(tensor) != checksum(tensor.T)
    # A transposed view counts in the order of its own rows.
    assert checksum(tensor.T) == checksum(tensor.T.contiguous())


def test_zeros_in_another_number_are_seen() -> None:
    assert len({checksum(torch.zeros(n)) for n in range(50)}) == 50


def test_parameters_are_tensors_too() -> None:
    tensor = drawn(torch.float32, 4)
    assert checksum(torch.nn.Parameter(tensor)) == checksum(tensor)
