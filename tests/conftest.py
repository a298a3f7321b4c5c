"""Shapes are checked in every test: jaxtyping's hook and beartype, before any import."""

import os

# Set before torch loads: the suite runs on as many workers as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook(["rlpt", "rlpt_kernels", "rlpt_data"], "beartype.beartype")
