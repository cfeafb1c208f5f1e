"""The compilers of other machines: XLA takes ptxas from PATH, and pip installs it deep inside a package."""

import os
import shutil
import sys
from pathlib import Path

import pytest

for path in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/**/bin/ptxas"):
    os.environ["PATH"] = f"{path.parent}{os.pathsep}{os.environ['PATH']}"


def pytest_collection_modifyitems(items):
    """Warnings of other compilers are theirs."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def ptxas():
    """Fails, and does not skip, where it is missing."""
    found = shutil.which("ptxas")
    assert found, "no ptxas: pip install nvidia-cuda-nvcc"
    return found
