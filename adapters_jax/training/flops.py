"""The arithmetic of a traced program's matrix products: what a compiler's count leaves out.

XLA counts what a loop does once, however often it runs, and nothing of a kernel that is not its own
(attention's on a GPU).
"""

import math
from typing import Any


def product_flops(jaxpr: Any, passes: bool = True) -> float:
    """Return the additions and multiplications of all matrix products of a traced program.

    What a loop does counts for each pass, or once where not `passes`; what each device does with
    its own part, for all devices.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [part for value in equation.params.values() for part in _programs_in(value)]
        times = 1
        if passes and equation.primitive.name == 'scan':
            times = equation.params['length']
        elif equation.primitive.name == 'shard_map':
            sizes = equation.params['mesh'].shape
            times = math.prod(sizes[axis] for axis in equation.params['newly_manual_axes'])
        total += times * sum(product_flops(part, passes) for part in inner)
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            left = equation.invars[0].aval.shape
            summed = math.prod(left[axis] for axis in contracted)
            total += 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
    return total


def _programs_in(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [part for item in value for part in _programs_in(item)]
    return [value] if hasattr(value, 'eqns') or hasattr(value, 'jaxpr') else []


def in_loops(jaxpr: Any) -> float:
    """Return how many times the products of a program are those that are counted once a loop."""
    once = product_flops(jaxpr, passes=False)
    return product_flops(jaxpr) / once if once else 1.0
