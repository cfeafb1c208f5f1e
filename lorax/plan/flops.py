"""Floating-point operations of a step, counted on paper.

N tokens, s of them in a row; P parameters of the layers' matrices, H of the head's, q = heads x head_dim, L layers; r
the rank and S = sum over adapted matrices of (in + out). A multiply and an add are two operations.

    layers forward        2 N P + 4 L N s q + 2 N r S        products, attention (all keys of every query), x A and h B
    again, with remat     the same
    attention's scores    2 L N s q, once more where a block or a layer drops them
    backward in x         2 N P + 8 L N s q + 2 N r S
    backward in weights   2 N r S of factors (VeRA's do not train); 2 N P where whole weights train
    head                  2 N H forward, 2 N H back; twice as much where it trains itself

A head that trains alone has no backward pass below it. The masked half of the attention's scores is computed, and so it
is counted. Padding that a kernel adds is not, but that of a mixed batch is: every row meets the largest rank. A
variant's work on weights alone (DoRA's norms) does not grow with tokens, and is left out.
"""

from __future__ import annotations

import math
from typing import Any

from lorax.choose import is_head
from lorax.models.attention import LONG
from lorax.plan.job import Job
from lorax.plan.parts import low_rank, trains_factors
from lorax.tree import named_leaves


def matrices(params: Any) -> int:
    """Parameters of the layers' matrices."""
    return sum(math.prod(leaf.shape) for path, leaf in named_leaves(params) if _is_matrix(path))


def step_flops(job: Job, params: Any) -> float:
    """Operations of one optimizer step, over all chips.

    Args:
        job: the step.
        params: its adapted tree, abstract.
    """
    c, n = job.config, job.batch * job.seq
    products, factors, head = 2 * n * matrices(params), 2 * n * low_rank(params), 2 * n * c.hidden_size * c.vocab_size
    scores = 4 * c.num_layers * n * job.seq * c.num_heads * c.head_dim
    forward = products + scores + factors
    if job.method == "head":
        return float(forward + 4 * head)
    again = (forward if job.remat else 0) + (scores // 2 if job.seq > LONG or not job.remat else 0)
    back = products + 2 * scores + (2 if trains_factors(params) else 1) * factors
    if job.method == "full":
        return float(forward + again + back + products + 4 * head)
    return float(forward + again + back + 2 * head)


def _is_matrix(path: str) -> bool:
    return path.startswith("layers/") and path.endswith("kernel") and not is_head(path)
