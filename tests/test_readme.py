"""The README's examples run as they stand, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_is_one_example_for_linen_and_one_for_nnx():
    assert len(BLOCKS) == 2
    assert "linen" in BLOCKS[0]
    assert "nnx.merge" in BLOCKS[1]
    # "Twenty lines": what a reader takes in at once.
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 26 for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=["linen", "nnx"])
def test_example_runs(block, capsys):
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    import jax
    import jax.numpy as jnp

    moved = jax.tree.leaves(jax.tree.map(lambda x: jnp.abs(x).max(), scope["trainable"]))
    assert all(bool(jnp.isfinite(m)) for m in moved)
    # After one step every trained array has moved, and a B that stayed zero would be seen here.
    assert min(float(m) for m in moved) > 0


def test_commands_of_the_readme_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\S+)", README, re.M):
        assert f"\n{target}:" in makefile
    from lorax.cli import main

    for command in sorted(set(re.findall(r"^    lorax (\S+)", README, re.M))):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


def test_the_table_of_figures_admits_every_bar_that_was_missed():
    file = Path(__file__).parents[1] / "lorax" / "bench" / "results" / "train_step.json"
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    table = README[README.index("\n## Figures") :]
    missed = [name for name, figure in figures.items() if figure["met"] is False]
    assert table.count("**missed**") == len(missed), f"the record says that these were missed: {missed}"
