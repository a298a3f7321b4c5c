"""AdamW with no-decay groups, and the learning-rate schedule as a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn

from rlpt.stages import OptimizerConfig


def adamw(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay on matrices; vectors (norms, biases) are exempt. Moments are fp32 like the masters.

    Loshchilov and Hutter 2019. Fused, because it alone steps DTensors without a dispatch per parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def learning_rate(cfg: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of the update after ``step`` completed ones of a stage of ``steps``: warm-up, then the schedule."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    shape = 1.0 - done if cfg.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return cfg.lr * (cfg.final_fraction + (1.0 - cfg.final_fraction) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
