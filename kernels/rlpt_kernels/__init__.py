"""Kernels: torch and Triton only, each with a float32 torch reference beside it."""

from rlpt_kernels.head import LogProb
from rlpt_kernels.linear_logprob import linear_logprob

__all__ = ["LogProb", "linear_logprob"]
