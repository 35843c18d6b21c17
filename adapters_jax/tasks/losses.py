"""What the losses of several kinds of tasks share."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


def check_smoothing(value: Any) -> None:
    """Refuse a label smoothing outside 0 to 1, where it is a number and not traced.

    Raises:
        ValueError: naming it.
    """
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f'label smoothing must lie between 0 and 1, not {value}')


def refuse_smoothing(value: Any, what: str) -> None:
    """Refuse any label smoothing.

    Raises:
        ValueError: naming it, and what it is not for.
    """
    if not isinstance(value, int | float) or value != 0:
        raise ValueError(f'label smoothing is for classes: {what} takes 0, not {value}')


def masked_sum(
    example_loss: Callable[[Float32[Array, 'B S C'], Array], Float32[Array, 'B S']],
    outputs: Float[Array, 'B S C'],
    labels: Array,
    mask: Bool[Array, 'B S'],
) -> tuple[Float32[Array, ''], Float32[Array, '']]:
    """Sum a loss over the examples of a batch that are real, and count these.

    Empty places are zeroed before the loss as well as after it: a NaN there would otherwise come
    back through the gradient of the branch that the second `where` discards.
    """
    outputs = jnp.where(mask[..., None], outputs.astype(jnp.float32), 0.0)
    losses = example_loss(outputs, labels)
    return jnp.where(mask, losses, 0.0).sum(), mask.sum(dtype=jnp.float32)
