"""`lorax plan`: will it fit, what will it cost? No weight is downloaded."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorax.cli.output import print_json, print_table


@dataclass(frozen=True)
class Args:
    """Say whether a fine-tuning step fits on a machine, what it computes and what crosses the wire.

    Example: lorax plan --base llama-3.1-70b --method qlora --target v5e:8x8 --mesh data=8,model=8 --compile
    """

    base: str = "smollm2-135m"
    """A preset (llama-3.1-70b, qwen3-8b, mistral-7b, smollm2-135m, ...), a config.json, or hf:org/name."""
    method: Literal["lora", "qlora", "multi-lora", "multi-qlora", "full", "head"] = "qlora"
    """What trains; multi-: many adapters together in one mixed batch, each of its rows for one of them."""
    rank: int = 16
    """LoRA rank r."""
    targets: tuple[str, ...] = ("all-linear",)
    """Weights that get factors, as for lorax train."""
    variant: Literal["lora", "dora", "lora-fa", "vera"] = "lora"
    """Kind of change, as for lorax train."""
    seq: int = 4096
    """Tokens in a row."""
    batch: int = 16
    """Rows of a step, over all chips."""
    target: str = "v5e:4x4"
    """The chips: v5e:4x4, v6e:4x4, v5p:2x2x1, v4:2x2x2, h100:8, h100:2x8, or a size of memory such as 48GB."""
    mesh: str | None = None
    """Axes over the chips: data=4,model=4. data (or fsdp) splits batch and weights, replica the batch alone,
    model the arithmetic."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights and of the arithmetic; factors and Adam's moments are float32."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or AdamW with its moments in 8 bits."""
    remat: bool = True
    """Layers are computed again in the backward pass."""
    compile: bool = False
    """Ask the chip's own compiler as well (the aot extra); its verdict then counts."""
    hlo: str | None = None
    """With --compile: write the compiled program to this file."""
    sweep: bool = False
    """A table: full, head, LoRA, QLoRA, many adapters trained together, and served."""
    adapters: int = 64
    """Adapters that are trained together (multi-lora, multi-qlora), and in the sweep served."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        # Nothing is computed here but shapes: no accelerator is taken, or waited for.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from lorax.plan import Job, config_of, parse_mesh, parse_target

        target = parse_target(self.target)
        mesh = parse_mesh(self.mesh, target, self.batch)
        options = {
            name: getattr(self, name)
            for name in ("rank", "targets", "variant", "adapters", "seq", "batch", "dtype", "optimizer", "remat")
        }
        job = Job(config_of(self.base), self.method, target, mesh, **options)
        if self.sweep:
            self._sweep(job)
            return
        from lorax.plan.answer import answer

        found = {"command": shlex.join(["lorax", "plan", *words]), **answer(self.base, job, self.compile, self.hlo)}
        print_json(found) if self.json else _show(found)

    def _sweep(self, job: Any) -> None:
        from lorax.plan.sweep import as_json, sweep

        rows = sweep(job, self.adapters)
        if self.json:
            print_json({"base": self.base, "target": str(job.target), "mesh": job.mesh, "rows": as_json(rows)})
            return
        head = ("", "trains", "base", "adapter", "gradients", "optimizer", "activations", "a chip", "fits", "saved")
        body = [
            (
                row.name,
                f"{row.trained / 1e6:.1f}M",
                *(_gb(size) for size in row.bytes.values()),
                _gb(row.chip),
                "yes" if row.fits else "no",
                _gb(row.adapter_file),
            )
            for row in rows
        ]
        print(f"{self.base}, {self.batch} x {self.seq} tokens, rank {self.rank}, on {job.target}; GB")
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        for name, *figures in (head, *body):
            cells = (cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))
            print("  ".join([name.ljust(widths[0]), *cells]))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 5e6 or not size else f"{size / 1e9:.4f}"


def _show(found: dict[str, Any]) -> None:
    from lorax.plan.closed import PARTS

    chip, tokens = found["per_chip"], found["tokens"]
    mesh = ", ".join(f"{name}={size}" for name, size in found["mesh"].items())
    rank = f" rank {found['rank']}" if found["rank"] else ""
    what = f"{found['base']}, {found['method']}{rank}, {tokens['batch']} x {tokens['seq']} tokens"
    rows = [(part, _gb(found["bytes"][part]), _gb(chip[part])) for part in PARTS]
    rows.append(("closed form", _gb(sum(found["bytes"].values())), _gb(chip["closed"])))
    real = found.get("compiled")
    if real:
        rows.append(("compiler", "", _gb(real["bytes"])))
    rows.append(("capacity", "", _gb(chip["capacity"])))
    print(f"{what} on {found['target']} ({mesh})")
    print_table(("GB", "all chips", "a chip"), rows)
    base, trained = (f"{found['parameters'][what]:,}" for what in ("base", "trained"))
    print(f"trains {trained} parameters beside a base of {base}")
    print(f"a step: {found['flops']:.3g} FLOPs; a chip receives {_gb(found['wire']['total'])} GB")
    if real:
        _show_compiled(real, found["difference"])
    spare = chip["spare"]
    print(
        f"fits, {_gb(spare)} GB a chip to spare" if found["fits"] else f"does not fit: {_gb(-spare)} GB a chip too much"
    )
    for line in found["advice"]:
        print(f"  try {line}")


def _show_compiled(real: dict[str, Any], difference: dict[str, float]) -> None:
    verdict = "refused: it wants" if real["refused"] else "takes"
    seconds = sum(real["seconds"].values())
    print(f"the compiler {verdict} {_gb(real['bytes'])} GB a chip, after {seconds:.0f} s; ", end="")
    print(f"the closed form says {100 * difference['memory']:+.0f}%")
    if real["refused"]:
        return
    moved = ", ".join(
        f"{int(row['count'])} {kind} ({_gb(row['bytes'])} GB)" for kind, row in sorted(real["collectives"].items())
    )
    print(f"  a step on the wire: {moved or 'nothing'}")
