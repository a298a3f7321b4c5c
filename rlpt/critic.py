"""Value heads: linear readouts of the policy's hidden states, for PPO's token-level advantages.

It is small and the same on every rank, so it lives beside the sharded policy, with gradients that are summed by hand.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlpt import dist, rng
from rlpt.advantage import gae
from rlpt.optim import set_learning_rate
from rlpt.stages import OptimizerConfig
from rlpt.terms import CriticConfig

_START = 0.1
"""Standard deviation of a twin's first values, where the entries of a hidden state are about 1."""


class Critic(nn.Module):
    """V_k(state) = w_k . hidden + b_k, in float32, of K heads. One is 0 everywhere to begin with; twins are draws."""

    def __init__(
        self, width: int, cfg: OptimizerConfig, world: dist.World, num_heads: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_heads, device=world.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if num_heads > 1:
            drawn = [rng.generator(seed, "critic", k).normal(size=width) for k in range(num_heads)]
            start_KD = torch.from_numpy(np.stack(drawn) * _START / width**0.5)
            self.head.weight.data.copy_(start_KD)
        self.world = world
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0
        )

    def forward(self, hidden_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R K"]:
        return self.head(hidden_RD.float())

    @property
    def has_finite_gradients(self) -> bool:
        """Of this rank's own."""
        gradients = [each.grad for each in self.head.parameters() if each.grad is not None]
        return all(bool(each.isfinite().all()) for each in gradients)

    @torch.no_grad()
    def step(self, rate: float, loss_scale: float) -> None:
        """Sum the gradients over ranks, undo the factors of the loss, step. Collective."""
        factor = 1.0 / (self.world.size * loss_scale)
        for parameter in self.head.parameters():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            summed = dist.total(own.flatten().tolist(), self.world)
            parameter.grad = (torch.tensor(summed, device=own.device) * factor).view_as(own).float()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Estimated(NamedTuple):
    """What the heads make of a micro-batch's rewards."""

    advantage_R: Float[np.ndarray, " R"]
    """The mean of what each of them estimates."""
    return_RK: Float[np.ndarray, "R K"]
    """What each of them learns."""


def estimated(
    value_RK: Float[Tensor, "R K"],
    reward_N: Float[np.ndarray, " N"],
    lengths: Sequence[int],
    cfg: CriticConfig,
) -> Estimated:
    """Generalised advantages by each head, and its own returns: advantage + value. See `rlpt.advantage.gae`."""
    known_RK = value_RK.detach().double().cpu().numpy()
    each_KR = [gae(reward_N, own_R, lengths, cfg.gamma, cfg.gae_lambda) for own_R in known_RK.T]
    advantage_RK = np.stack(each_KR, axis=1)
    return Estimated(advantage_RK.mean(axis=1), advantage_RK + known_RK)
