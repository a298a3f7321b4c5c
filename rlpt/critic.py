"""A value head: one linear readout of the policy's hidden states, for PPO's token-level advantages.

It is small and the same on every rank, so it lives beside the sharded policy, with gradients that are summed by hand.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlpt import dist
from rlpt.optim import set_learning_rate
from rlpt.stages import OptimizerConfig


class Critic(nn.Module):
    """V(state) = w . hidden + b, in float32; 0 everywhere to begin with."""

    def __init__(self, width: int, cfg: OptimizerConfig, world: dist.World) -> None:
        super().__init__()
        self.head = nn.Linear(width, 1, device=world.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.world = world
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0
        )

    def forward(self, hidden_RD: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
        return self.head(hidden_RD.float())[:, 0]

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
