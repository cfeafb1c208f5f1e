"""`lift`: any JAX function, made to take structured weights where it took plain ones.

api          lift itself: trace once, evaluate with rules
interpreter  walks a jaxpr; plain equations are bound as they are
values       what a structured weight is inside the walk: factors that broadcast against the weight
rules/       one small function per primitive that a weight can reach
control      scan, cond, while, jit, remat, shard_map: rebuilt around the walk
derivatives  custom_jvp and custom_vjp, with the user's rule kept
roles        the same walk with probes, to read which axes are in, out and stacked
compat       all that differs between the JAX versions we support
"""

from lorax.lift.api import lift

__all__ = ["lift"]
