"""One set of saved adapters and one running engine for all of a process's tests that change neither."""

from __future__ import annotations

import pytest
import serve_toys


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Adapters on disk; to be read only."""
    path = tmp_path_factory.mktemp("adapters")
    serve_toys.save(path)
    return path


@pytest.fixture(scope="session")
def engine(folder):
    """Serves all of them; the model has a word for each token."""
    with serve_toys.started(folder) as engine:
        yield engine
