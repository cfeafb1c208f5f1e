"""Imports run one way. This test reads every module's syntax tree, lazy imports inside functions included.

lorax_kernels <- core <- models io data distributed train analysis plan <- sweep serve <- cli bench
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CORE = {"errors", "paths", "spec", "weights", "choose", "adapt", "tree", "masks", "report", "lift", "variants"}
CORE |= {"quant", "quantized", "optim", "sharding", "linalg", "dropout", "rebase", "combine", "bank", "audit"}
LAYERS = [
    CORE | {"multi"},
    {"models", "io", "data", "distributed", "train", "analysis", "plan"},
    {"sweep", "serve"},
    {"cli", "bench", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What core may take from outside: nothing that only some users have.
CORE_OUTSIDE = {"jax", "numpy", "optax", "jaxtyping", "lorax_kernels", *sys.stdlib_module_names}
KERNELS_OUTSIDE = {
    "jax",
    "jaxlib",
    "numpy",
    "jaxtyping",
    "jax_triton",
    "triton",
    "lorax_kernels",
    *sys.stdlib_module_names,
}
FLAX_USERS = {"models", "cli", "bench"}


def imported(source: str) -> list[str]:
    """Dotted names of everything that a module imports, wherever in it; `from a import b` gives a.b."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            names = [alias.name for alias in node.names]
            # `from lorax import x` is the public door, unless x is one of the upper packages.
            door = node.module == "lorax" and not any(LEVEL.get(name, 0) for name in names)
            out += ["lorax"] if door else [f"{node.module}.{name}" for name in names]
    return out


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, named like `lorax.train.step`."""
    parts = module.split(".")
    if parts[0] == "lorax_kernels":
        return [f"{module} imports {n}" for n in imported(source) if n.split(".")[0] not in KERNELS_OUTSIDE]
    if len(parts) == 1 or parts[1] not in LEVEL:
        return []
    place, out = parts[1], []
    for name in imported(source):
        words = name.split(".")
        if words[0] != "lorax":
            if place in LAYERS[0] and words[0] not in CORE_OUTSIDE:
                out.append(f"{module} imports {name}: core takes nothing but JAX, NumPy and Optax")
            if words[0] == "flax" and place not in FLAX_USERS:
                out.append(f"{module} imports {name}: Flax enters at models")
            continue
        target = words[1] if len(words) > 1 else ""
        if target in LEVEL and LEVEL[target] > LEVEL[place]:
            out.append(f"{module} imports {name}: {place} may not know {target}")
        if target not in LEVEL and LEVEL[place] == 0:
            out.append(f"{module} imports {name}: core imports core's own modules, not the public door")
        if place == "serve" and target == "train":
            out.append(f"{module} imports {name}: serve never imports train")
    return out


def modules() -> list[tuple[str, Path]]:
    roots = [(ROOT, "lorax"), (ROOT / "kernels", "lorax_kernels")]
    found = []
    for root, package in roots:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found.append((name, path))
    return found


def test_every_module_has_a_place():
    packages = {name.split(".")[1] for name, _ in modules() if name.startswith("lorax.")}
    assert packages <= set(LEVEL), f"add {packages - set(LEVEL)} to a layer"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_arrows(name, path):
    assert violations(name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lorax.tree", "from lorax.models import load"),
        ("lorax.lift.rules.products", "def f():\n    import flax"),
        ("lorax.train.step", "from flax import nnx"),
        ("lorax.serve.engine", "from lorax.train.loss import cross_entropy"),
        ("lorax.models.load", "import lorax.cli"),
        ("lorax.masks", "from lorax import adapt"),
        ("lorax_kernels.nf4.api", "import lorax"),
    ],
)
def test_a_broken_arrow_is_seen(module, source):
    assert violations(module, source)


def test_kernels_is_a_source_root_and_no_package():
    # Hugging Face's package of that name is probed for by transformers, PEFT and bitsandbytes.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_torch_stays_in_the_wider_tiers():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if {"peers", "aot"} & set(path.parts) or path.parent.name == "golden" or path.name.startswith("make_"):
            continue
        outside = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
        assert not outside & {"torch", "transformers", "peft"}, path
