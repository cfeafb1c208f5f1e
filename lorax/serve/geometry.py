"""How keys, values and adapters lie in one pool of pages.

A page holds `page_tokens` tokens' keys and values of all layers. Seen by attention, and seen by the adapters, it is

    (layers, 2, kv_heads, page_tokens, head_dim)        and        units of `unit` numbers, one after the other

where `unit` divides every number of features that a linear map has: then a row of a factor is a whole number of units
wherever it begins, of grouped-query attention's narrow keys as of the wide MLP, and rows of all widths lie close
together. A weight's adapter takes, layer after layer, its rank's rows of A (transposed), then those of B:

    unit of row p of A in layer l     l * rank * (ui + uo) + p * ui                 ui = in / unit, uo = out / unit
    unit of row p of B in layer l     l * rank * (ui + uo) + rank * ui + p * uo

so what is lost is less than a page a sequence and less than a page a weight, for any rank.

Source: Sheng et al. 2023, "S-LoRA" (unified paging); there, a page is one row of the hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lorax.errors import LoraxError
from lorax.models import ModelConfig


class Site(NamedTuple):
    """A linear map inside a layer, as one device has it.

    path: of its weight in the layers' tree, `attn/q_proj/kernel`.
    split: which factor is split over devices: "out" (B) or "in" (A).
    """

    path: str
    size_in: int
    size_out: int
    split: str


@dataclass(frozen=True)
class Geometry:
    """Sizes on one device. All pages are alike; page 0 is nobody's: what is padded is written there."""

    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    pages: int
    sites: tuple[Site, ...]

    @property
    def page_size(self) -> int:
        """Numbers in a page."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.page_tokens

    @property
    def unit(self) -> int:
        """The widest piece that every row of every factor is made of."""
        return math.gcd(self.page_size, *(size for site in self.sites for size in (site.size_in, site.size_out)))

    @property
    def page_units(self) -> int:
        """Units in a page."""
        return self.page_size // self.unit

    def pages_of_tokens(self, tokens: int) -> int:
        """Pages that so many tokens of a sequence take."""
        return -(-tokens // self.page_tokens)

    def pages_of_weight(self, site: int, rank: int) -> int:
        """Pages that an adapter of this rank takes at one site."""
        at = self.sites[site]
        return -(-self.layers * rank * (at.size_in + at.size_out) // self.page_size)


def geometry(config: ModelConfig, page_tokens: int, pages: int, shards: int = 1) -> Geometry:
    """The layout for a model, on each of `shards` devices.

    Raises:
        LoraxError: heads or features that cannot be shared out evenly.
    """
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(config, name) % shards:
            raise LoraxError(f"engine: {name} {getattr(config, name)} cannot be split over {shards} devices evenly")
    d, h = config.hidden_size, config.head_dim
    q, kv, f = (n // shards for n in (config.num_heads * h, config.num_kv_heads * h, config.intermediate_size))
    sites = (
        Site("attn/q_proj/kernel", d, q, "out"),
        Site("attn/k_proj/kernel", d, kv, "out"),
        Site("attn/v_proj/kernel", d, kv, "out"),
        Site("attn/o_proj/kernel", q, d, "in"),
        Site("mlp/gate_proj/kernel", d, f, "out"),
        Site("mlp/up_proj/kernel", d, f, "out"),
        Site("mlp/down_proj/kernel", f, d, "in"),
    )
    return Geometry(config.num_layers, config.num_kv_heads // shards, h, page_tokens, pages, sites)
