"""Kernels: torch and Triton only, each with a float32 torch reference beside it."""

from rlpt_kernels.head import LogProb
from rlpt_kernels.linear_logprob import linear_logprob
from rlpt_kernels.policy_loss import PolicyLoss, linear_policy_loss

__all__ = ["LogProb", "PolicyLoss", "linear_logprob", "linear_policy_loss"]
