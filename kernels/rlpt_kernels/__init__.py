"""Kernels: torch and Triton only, each with a float32 torch reference beside it."""
