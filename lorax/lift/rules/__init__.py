"""The rules, by what they do to a weight. Importing this package registers them.

products     where a weight is used up: dot_general, ragged_dot, convolution
lookups      gather: rows of an embedding, experts of a stack
shapes       transpose, reshape, slices, broadcasts: a weight in, a weight out
elementwise  casts, copies, constants, constraints: a weight in, a weight out
pieces       weights cut along axis 0
packed       quantised weights
scaled       weights times the lengths of their columns
banked       weights with the changes of many adapters
"""

from lorax.lift.rules import banked, elementwise, lookups, packed, pieces, products, scaled, shapes

__all__ = ["banked", "elementwise", "lookups", "packed", "pieces", "products", "scaled", "shapes"]
