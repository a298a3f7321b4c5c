"""Counter-based randomness: pure functions of what they are for, with the right distributions."""

import numpy as np
import torch

from rlpt import rng
from rlpt.prompts import permute
from rlpt.rollout.sampling import sample

GOLDEN, MIX_1, MIX_2, MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 2**64 - 1


def splitmix(state: int) -> int:
    """The published finalizer on Python integers."""
    bits = ((state ^ (state >> 30)) * MIX_1) & MASK
    bits = ((bits ^ (bits >> 27)) * MIX_2) & MASK
    return bits ^ (bits >> 31)


def test_uniforms_are_splitmix64_on_unbounded_integers() -> None:
    keys = [rng.key(0, "a"), rng.key(1, "b", 2, "c"), -1, 2**62]
    got = rng.uniform(torch.tensor(keys), counter=3, width=5)
    for row, key in enumerate(keys):
        start = splitmix((key + GOLDEN * 4) & MASK)
        for column in range(5):
            bits = splitmix((start + GOLDEN * (column + 1)) & MASK) >> 11
            assert got[row, column].item() == (bits + 0.5) / 2**53


def test_splitmix_reference_stream_is_the_published_one() -> None:
    # First outputs of SplitMix64 seeded with 1234567, the vector that implementations are checked against.
    stream = [splitmix((1234567 + GOLDEN * (i + 1)) & MASK) for i in range(3)]
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_tell_parts_apart() -> None:
    keys = {
        rng.key(0, "a", "bc"),
        rng.key(0, "ab", "c"),
        rng.key(0, "abc"),
        rng.key(0, "a", "b", "c"),
        rng.key(0, "a", 1),
        rng.key(0, "a", "1"),
    }
    assert len(keys) == 6


def test_gumbel_noise_has_the_mean_and_variance_of_gumbel() -> None:
    noise = rng.gumbel(torch.tensor([rng.key(0, "gumbel", i) for i in range(64)]), 0, 4096)
    assert abs(noise.mean().item() - np.euler_gamma) < 0.01
    assert abs(noise.var().item() - np.pi**2 / 6) < 0.02


def test_samples_follow_the_softmax_without_the_banned_id() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    keys = torch.tensor([rng.key(0, "sample", i) for i in range(40_000)])
    draw = sample(logits.repeat(len(keys), 1), (3,), keys, position=0)
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0)
    counts = torch.bincount(draw.ids_N, minlength=4) / len(keys)
    assert counts[3] == 0
    # Four standard errors of a proportion at this size are below 0.01.
    assert torch.allclose(counts[:3].double(), expected, atol=0.01)
    assert torch.allclose(draw.logp_N.double(), expected.log()[draw.ids_N], atol=1e-6)


def test_permutation_is_one_and_depends_on_the_key() -> None:
    for count in (1, 2, 3, 7, 64, 1000):
        images = [permute(i, count, key=12345) for i in range(count)]
        assert sorted(images) == list(range(count))
    assert [permute(i, 100, 1) for i in range(100)] != [permute(i, 100, 2) for i in range(100)]


def test_permutation_scatters_neighbours() -> None:
    images = np.array([permute(i, 4096, key=99) for i in range(4096)])
    assert abs(np.corrcoef(np.arange(4096), images)[0, 1]) < 0.06
    assert np.abs(np.diff(images)).mean() > 1000
