"""Samples are what they were: noise and draws are computed in place, and nothing that a caller holds is written to."""

import numpy as np
import torch

from rlpt import rng
from rlpt.rollout.sampling import sample

GOLDEN = [[70, 86, 68, 66, 84, 98, 66, 98], [20, 84, 94, 85, 53, 39, 74, 93]]


def keys(count: int) -> torch.Tensor:
    return torch.tensor([rng.key(0, "sample", i) for i in range(count)])


def test_noise_is_minus_log_minus_log_of_the_uniforms() -> None:
    uniform = rng.uniform(keys(5), 7, 33)
    assert torch.equal(rng.gumbel(keys(5), 7, 33), -torch.log(-torch.log(uniform)))


def test_a_draw_is_the_argmax_of_scores_and_noise_in_float64() -> None:
    logits = torch.randn(64, 47, generator=torch.Generator().manual_seed(0)) * 3
    draw = sample(logits.clone(), (5, 46), keys(64), 11)
    kept = [i for i in range(47) if i not in (5, 46)]
    logp = torch.log_softmax(logits[:, kept].double(), dim=-1)
    best = (logp + rng.gumbel(keys(64), 11, 47)[:, kept]).argmax(dim=-1)
    assert draw.ids_N.tolist() == [kept[int(i)] for i in best]
    chosen = logp[torch.arange(64), best]
    assert (draw.logp_N.double() - chosen).abs().max() < 1e-6
    assert len(set(draw.ids_N.tolist())) > 20


def test_samples_of_a_fixed_seed_stay_what_they_are() -> None:
    """Recorded before noise was computed in place (2026-11-21)."""
    logits = torch.linspace(-2, 2, 101).repeat(8, 1)
    draws = [sample(logits.clone(), (100,), keys(8), position).ids_N.numpy() for position in (0, 1)]
    assert np.stack(draws).tolist() == GOLDEN


def test_keys_are_not_written_to() -> None:
    held = keys(6)
    sample(torch.zeros(6, 9), (), held, 2)
    rng.gumbel(held, 0, 4)
    assert torch.equal(held, keys(6))
