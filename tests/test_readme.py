"""The README's examples run as they stand, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_is_one_example_for_linen_and_one_for_nnx():
    assert len(BLOCKS) == 4
    assert "linen" in BLOCKS[0]
    assert "nnx.merge" in BLOCKS[1]
    assert "lorax.stack" in BLOCKS[2]
    assert "make_mesh" in BLOCKS[3]
    # "Twenty lines": what a reader takes in at once.
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 26 for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS[:2], ids=["linen", "nnx"])
def test_example_runs(block, capsys):
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    import jax
    import jax.numpy as jnp

    moved = jax.tree.leaves(jax.tree.map(lambda x: jnp.abs(x).max(), scope["trainable"]))
    assert all(bool(jnp.isfinite(m)) for m in moved)
    # After one step every trained array has moved, and a B that stayed zero would be seen here.
    assert min(float(m) for m in moved) > 0


def test_the_example_of_many_adapters_runs():
    scope: dict = {}
    exec(compile(BLOCKS[2], "README.md", "exec"), scope)
    import numpy as np

    assert scope["lorax"].adapter_names(scope["params"]) == ["legal", "medical", "support", None]
    assert scope["state"].count.tolist() == [1, 1, 0, 0]
    # After one step B is no longer zero, so the merged weight is another one.
    assert not np.allclose(scope["legal"]["up"], scope["base"]["up"])


def test_the_example_of_a_mesh_runs(capsys):
    scope: dict = {}
    exec(compile(BLOCKS[3], "README.md", "exec"), scope)
    (said,) = capsys.readouterr().out.splitlines()
    # What the comment beside it says, whatever this JAX calls the class.
    assert said.endswith("(None, 'data', None)")
    assert scope["placed"]["layers"]["q_proj"]["kernel"].A.sharding.mesh.axis_names == ("data", "model")


def test_commands_of_the_readme_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\S+)", README, re.M):
        assert f"\n{target}:" in makefile
    from lorax.cli import main

    for command in sorted(set(re.findall(r"^    lorax (\S+)", README, re.M))):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


def test_the_tables_of_figures_admit_every_bar_that_was_missed():
    table = README[README.index("\n## Figures") :]
    missed = []
    for name in sorted(set(re.findall(r"\]\((lorax/bench/results/\w+\.json)\)", table))):
        figures = json.loads((Path(__file__).parents[1] / name).read_text(encoding="utf-8"))["figures"]
        missed += [f"{name}: {key}" for key, figure in figures.items() if figure["met"] is False]
    assert missed
    assert table.count("**missed**") == len(missed), f"the records say that these were missed: {missed}"


def test_the_table_of_serving_admits_every_bar_that_was_missed():
    file = Path(__file__).parents[1] / "lorax" / "bench" / "results" / "serve.json"
    figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
    section = README[README.index("\n## Serving") : README.index("\n## Will it fit?")]
    missed = [name for name, figure in figures.items() if figure["met"] is False]
    assert section.count("**missed**") == len(missed), f"the record says that these were missed: {missed}"
