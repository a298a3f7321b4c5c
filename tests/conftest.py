"""Shapes and types are checked in every test: jaxtyping's hook and beartype, before any import."""

import os
import sys
import types

# Set before torch loads: the suite runs on as many workers as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# The hook takes a name, so the configured checker gets one. PEP 484 lets an int stand for a float,
# as pyright does; beartype does so only when told.
checker = types.ModuleType("rlpt_checker")
checker.__dict__["checked"] = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
install_import_hook(["rlpt", "rlpt_kernels", "rlpt_data"], "rlpt_checker.checked")
