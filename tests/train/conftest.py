"""A tiny base and data for it, made once (tests/tiny_run.py)."""

import pytest
from tiny_run import write_examples, write_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_examples(folder / "train.jsonl", 41), write_examples(folder / "held-out.jsonl", 13, seed=1)
