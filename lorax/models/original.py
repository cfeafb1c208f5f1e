"""A base's own weights, one at a time from its files: what a quantised copy of it was made from."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.models import packed
from lorax.models.config import ModelConfig
from lorax.models.hf import kinds, open_checkpoint
from lorax.models.read import read_layers
from lorax.models.resolve import resolve_base


class Original:
    """The files of a base, to be asked for parts of a weight: `Original(name)(path, slice(2, 3))`.

    path_or_name: as for `lorax.models.load`; nothing is read yet.
    dtype: of what is read.

    Example:
        original = Original("smollm2-135m", jnp.bfloat16)
        original("layers/mlp/up_proj/kernel", slice(0, 1)).shape      # (1, 576, 1536)
    """

    def __init__(self, path_or_name: str | os.PathLike[str], dtype: Any = jnp.float32):
        self._source = open_checkpoint(resolve_base(path_or_name))
        self._config = ModelConfig.from_hf(self._source.config)
        self._kinds = {kind.path: kind for kind in kinds(self._config)}
        self._dtype = np.dtype(dtype)

    @property
    def packed(self) -> bool:
        """Whether the files hold weights in 4 bits, so that there is nothing that came before."""
        return any(packed.is_packed(self._source.tensors, name) for name in self._source.tensors)

    def __call__(self, path: str, at: slice | None = None) -> jax.Array:
        """A weight in the tree's orientation: layers `at` of a stacked one, or the whole of one that is not.

        Raises:
            LoraxError: the file has no such weight, or has it in 4 bits.
        """
        kind = self._kinds.get(path)
        if kind is None:
            raise LoraxError(f"{self._source.path}: has no {path}; the weights are those of another model")
        every = range(self._config.num_layers) if kind.stacked else range(1)
        names = [kind.file_name(self._source.gguf, i) for i in (every[at] if at is not None else every)]
        if packed.is_packed(self._source.tensors, names[0]):
            raise LoraxError(f"{self._source.path}: holds {path} in 4 bits; name the model that it was made from")
        layers = list(read_layers(self._source, kind, self._config, self._dtype, names))
        layers = [layer.T if kind.transposed else layer for layer in layers]
        return jnp.stack(layers) if kind.stacked else layers[0]
