"""Where the optimizer state of a bank lies on a mesh: each row's with the row."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lorax.multi.names import banks
from lorax.multi.train import BankState
from lorax.sharding import shardings
from lorax.sharding.place import automatic
from lorax.sharding.rules import ZOO, Rules
from lorax.tree import named_leaves


def bank_state_shardings(state: BankState, params: Any, mesh: Any, rules: Rules = ZOO, roles: Any = None) -> BankState:
    """Shardings of what `bank_optimizer` keeps: an array as large as a factor lies as the factor does.

    A factor is `(*stack, total, features)` and its state `(total, *stack, features)`.

    Args:
        state: the state, abstract or not.
        params: the tree with the banks.
        mesh, rules, roles: as for `lorax.sharding.shardings`.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, optax
        >>> base = {"up_proj": {"kernel": jnp.ones((8, 4))}}
        >>> bank = lorax.stack([lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="*", rank=2))])
        >>> params, mesh = lorax.attach(base, bank), jax.make_mesh((1,), ("model",))
        >>> state = lorax.bank_optimizer(optax.adam, params, 1e-3).init(params)
        >>> bank_state_shardings(state, params, mesh).rows["up_proj/kernel"]["A"][0].mu.spec
        PartitionSpec(None, None)
    """
    mesh, found = automatic(mesh), banks(params, "bank_state_shardings")
    places = dict(named_leaves(shardings(params, mesh, rules, roles)))
    whole = NamedSharding(mesh, PartitionSpec())

    def rows(path: str, factor: str) -> Any:
        front = len(found[path].axes.stack)
        array = getattr(found[path], factor)
        names = [*getattr(places[path], factor).spec]
        names += [None] * (len(array.shape) - len(names))
        moved = [names[front], *names[:front], *names[front + 1 :]]
        shape = (array.shape[front], *array.shape[:front], *array.shape[front + 1 :])

        def one(x: Any) -> NamedSharding:
            if tuple(x.shape) == shape:
                return NamedSharding(mesh, PartitionSpec(*moved))
            return NamedSharding(mesh, PartitionSpec(moved[0])) if tuple(x.shape) == shape[:1] else whole

        return jax.tree.map(one, state.rows[path][factor])

    return BankState(whole, {path: {f: rows(path, f) for f in each} for path, each in state.rows.items()})  # pyright: ignore
