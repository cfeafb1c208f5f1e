"""Servers over the small engine."""

from __future__ import annotations

import pytest
from http_site import put_adapter, served

from lorax.serve.http import keys


@pytest.fixture
def root(tmp_path):
    """A folder of adapters: one by itself, one in a run's folder."""
    put_adapter(tmp_path / "adapters" / "legal", b"legal weights")
    put_adapter(tmp_path / "adapters" / "medical" / "adapter", b"medical weights")
    return tmp_path / "adapters"


@pytest.fixture
def server(root):
    """A server without a keys file."""
    with served(root) as found:
        yield found


@pytest.fixture
def tenants(root, tmp_path):
    """A server with keys: alice may use legal, bob medical, ann everything, root may administrate."""
    file = tmp_path / "keys.json"
    found = {
        "alice": keys.add(file, "alice", ["legal", "not-there"]),
        "bob": keys.add(file, "bob", ["medical"]),
        "ann": keys.add(file, "ann"),
        "root": keys.add(file, "root", admin=True),
    }
    with served(root, keys_file=file) as site:
        site.keys = {name: {"Authorization": f"Bearer {key}"} for name, key in found.items()}
        site.secrets, site.file = found, file
        yield site
