"""The walk over a jaxpr: plain equations are bound as they are, those that a structured weight reaches by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorax.errors import LoraxError
from lorax.lift import compat
from lorax.lift.values import Deferred, Unsupported, Value, densify

Rule = Callable[["Interpreter", Any, list[Any]], list[Any]]

# (primitive, class of the structured operand) -> rule. The modules of `rules/` and `roles` fill it.
RULES: dict[tuple[str, type], Rule] = {}

# primitive -> rule for those that hold a jaxpr, whatever the class of the structured operands.
CONTROL: dict[str, Rule] = {}

# Those of them that carry a deferred weight as it is; the others (custom derivatives) look into it.
CARRIES: set[str] = set()


def rule(primitive: str, *classes: type) -> Callable[[Rule], Rule]:
    """Register a function as the rule of a primitive for some classes of structured operand."""

    def register(function: Rule) -> Rule:
        for cls in classes:
            RULES[primitive, cls] = function
        return function

    return register


def control(*primitives: str, carries: bool = True) -> Callable[[Rule], Rule]:
    """Register a function as the rule of primitives that hold a jaxpr.

    carries: a deferred weight passes through as it is.
    """

    def register(function: Rule) -> Rule:
        for primitive in primitives:
            CONTROL[primitive] = function
        if carries:
            CARRIES.update(primitives)
        return function

    return register


class Interpreter:
    """Evaluates jaxprs on arrays and structured values.

    materialize: build the dense weight where no rule serves, instead of raising.
    """

    def __init__(self, materialize: bool = False):
        self.materialize = materialize

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr (closed or open without constants) on arrays and values."""
        inner, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(inner.constvars, consts, strict=True))
        env.update(zip(inner.invars, args, strict=True))
        last = _last_uses(inner)
        for index, eqn in enumerate(inner.eqns):
            values = [compat.value_of(atom, env) for atom in eqn.invars]
            with compat.context(eqn):
                outs = self.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
            # An intermediate is let go after its last use, as a plain evaluation would.
            for var in last.get(index, ()):
                env.pop(var, None)
        return [compat.value_of(atom, env) for atom in inner.outvars]

    def bind(self, eqn: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluate one equation."""
        structured = [arg for arg in args if isinstance(arg, Value)]
        if not structured:
            return compat.bind(eqn, args)
        if eqn.primitive.name not in CARRIES and any(isinstance(arg, Deferred) for arg in structured):
            args = [arg.ready() if isinstance(arg, Deferred) else arg for arg in args]
            structured = [arg for arg in args if isinstance(arg, Value)]
        try:
            return self._by_rule(eqn, list(args), structured)
        except Unsupported as reason:
            if self.materialize:
                return compat.bind(eqn, [densify(arg) for arg in args])
            raise self._error(eqn, structured, reason) from None

    def _by_rule(self, eqn: Any, args: list[Any], structured: list[Value]) -> list[Any]:
        name = eqn.primitive.name
        found = CONTROL.get(name)
        if found is None:
            if len(structured) > 1:
                raise Unsupported("two structured weights meet in one operation")
            found = RULES.get((name, type(structured[0])))
        if found is None:
            raise Unsupported("there is no rule for it")
        return found(self, eqn, args)

    def _error(self, eqn: Any, structured: list[Value], reason: Unsupported) -> LoraxError:
        paths = ", ".join(dict.fromkeys(value.path for value in structured))
        return LoraxError(
            f"{paths}: a structured weight reaches the primitive `{eqn.primitive.name}` at {compat.where(eqn)}: "
            f'{reason}; leave this weight out of the targets, or lift(fn, on_unsupported="materialize") '
            "to build the dense weight there"
        )


def where_structured(args: Sequence[Any]) -> int:
    """The position of the one structured operand."""
    return next(i for i, arg in enumerate(args) if isinstance(arg, Value))


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not hasattr(atom, "val"):
                last[atom] = index
    for atom in jaxpr.outvars:
        if not hasattr(atom, "val"):
            last.pop(atom, None)
    uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses
