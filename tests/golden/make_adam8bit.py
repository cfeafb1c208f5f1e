"""Writes adam8bit.npz: blockwise 8-bit codes, and steps of AdamW8bit, as bitsandbytes computes them on a CPU.

pip install torch bitsandbytes
python tests/golden/make_adam8bit.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("adam8bit.npz")

# name: shape, block size, signed. Odd sizes, a block of zeros, one block only, values of very different sizes.
CASES: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "odd": ((1003,), 256, True),
    "odd_unsigned": ((1003,), 256, False),
    "matrix": ((5, 512), 256, True),
    "matrix_unsigned": ((5, 512), 64, False),
    "stacked": ((3, 7, 67), 128, True),
    "short": ((7,), 4096, True),
    "one": ((1,), 64, False),
}
STEPS, SHAPE, LEARNING_RATE, DECAY = 6, (17, 256), 1e-2, 0.1


def values(name: str, seed: int = 0) -> np.ndarray:
    """The input of a case: normal numbers over eight decades, with zeros of both signs and a block of zeros."""
    shape, block, signed = CASES[name]
    random = np.random.default_rng([seed, *name.encode()])
    x = random.standard_normal(shape) * 10.0 ** random.uniform(-8, 0, shape)
    flat = (x if signed else np.abs(x)).astype(np.float32).reshape(-1)
    if flat.size > 2 * block:
        flat[block : 2 * block] = 0
        flat[3], flat[5] = 0.0, -0.0
    return flat.reshape(shape)


def gradients(seed: int = 0) -> np.ndarray:
    """Gradients of `STEPS` steps; rows differ in size by four decades, and one gets none."""
    random = np.random.default_rng(seed)
    g = random.standard_normal((STEPS, *SHAPE)) * np.logspace(-4, 0, SHAPE[0])[:, None]
    g[:, 4] = 0
    return g.astype(np.float32)


def start(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def peer_codes(x: np.ndarray, block: int, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and values by the installed bitsandbytes."""
    import torch
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed)
    q, state = functional.quantize_blockwise(torch.from_numpy(x.copy()), code, blocksize=block)
    back = functional.dequantize_blockwise(q, state)
    return q.numpy(), state.absmax.numpy(), back.numpy()


def peer_steps(parameters: np.ndarray, g: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters after each step of the installed bitsandbytes, and its state after the last."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    weight = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    optimizer = AdamW8bit([weight], lr=LEARNING_RATE, weight_decay=DECAY)
    trace = []
    for one in g:
        weight.grad = torch.from_numpy(one.copy())
        optimizer.step()
        trace.append(weight.detach().numpy().copy())
    state: Any = optimizer.state[weight]
    kept = {name: state[name].numpy() for name in ("state1", "state2", "absmax1", "absmax2")}
    return {"trace": np.stack(trace), **kept}


def main() -> None:
    out = {}
    for name, (_, block, signed) in CASES.items():
        out[f"{name}/codes"], out[f"{name}/absmax"], _ = peer_codes(values(name), block, signed)
    steps = peer_steps(start(), gradients())
    out |= {f"steps/{name}": array for name, array in steps.items() if name != "trace"}
    out["steps/last"] = steps["trace"][-1]
    np.savez_compressed(PATH, **out)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
