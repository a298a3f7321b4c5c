"""Shapes and types are checked in every test: jaxtyping's hook and beartype, before any import."""

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

# Set before torch loads: the suite runs on as many workers as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run on CPU tensors where there is no GPU. Read when they are defined.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

# The hook takes a name, so the configured checker gets one. PEP 484 lets an int stand for a float,
# as pyright does; beartype does so only when told.
checker = types.ModuleType("rlpt_checker")
checker.__dict__["checked"] = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker


class _DeviceCode:
    """Modules of device code are imported as they are: Triton reads their source, and there is no call to check."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        device_code = name in ("rlpt_kernels.triton_kernels", "rlpt_kernels.triton_rows")
        return importlib.machinery.PathFinder.find_spec(name, path, target) if device_code else None


# Machines are shared: an example that is slow once is no mistake.
settings.register_profile("rlpt", deadline=None)
settings.load_profile("rlpt")
install_import_hook(["rlpt", "rlpt_kernels", "rlpt_data"], "rlpt_checker.checked")
sys.meta_path.insert(0, _DeviceCode)


@pytest.fixture(scope="session")
def module_at():
    """Load a module of a folder of tests by its path: such folders are no packages."""

    def load(path: Path) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
