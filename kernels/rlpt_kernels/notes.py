"""What the library decides by itself is said in the log (`rlpt_kernels`, INFO): one line for each choice."""

import logging

import torch

_log = logging.getLogger("rlpt_kernels")
_said: set[str] = set()


@torch.compiler.assume_constant_result
def once(text: str) -> None:
    """Say it, unless it has been said."""
    if text not in _said:
        _said.add(text)
        _log.info(text)
