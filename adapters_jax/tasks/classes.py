"""What tasks have in common whose outputs are scores of classes: their names, and their loss."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from adapters_jax.tasks.losses import check_smoothing, masked_sum


def checked_labels(labels: Any, task: str) -> tuple[str, ...]:
    """Return the names of classes, if they are such.

    Raises:
        ValueError: fewer than two classes, or a class named twice or not by a text.
    """
    if not isinstance(labels, list | tuple):
        raise ValueError(f'labels is {labels!r}; expected a list of names')
    wrong = [label for label in labels if not isinstance(label, str) or not label]
    if wrong:
        raise ValueError(f'classes are named by texts that are not empty, not by {wrong[0]!r}')
    if len(labels) < 2:
        raise ValueError(f'{task} needs at least two classes, not {len(labels)} ({listed(labels)})')
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(f'each class may be named once, but these are repeated: {twice}')
    return tuple(labels)


def ids_of(values: Iterable[str], labels: Sequence[str]) -> dict[str, int]:
    """Return the classes' ids by name, having found every value among them.

    Raises:
        ValueError: a value that is no class.
    """
    ids = {label: index for index, label in enumerate(labels)}
    unseen = Counter(value for value in values if value not in ids)
    if unseen:
        found = ', '.join(f'{label!r} ({n} times)' for label, n in unseen.most_common(5))
        more = f' and {len(unseen) - 5} more' if len(unseen) > 5 else ''
        raise ValueError(
            f'unseen labels {found}{more}; known: {listed(labels)}. Correct them, or '
            f'name all classes in the task'
        )
    return ids


def listed(labels: Sequence[str]) -> str:
    """List class names for a message, the first 20 of many."""
    more = f' and {len(labels) - 20} more' if len(labels) > 20 else ''
    return ', '.join(map(repr, labels[:20])) + more


def cross_entropy_sum(
    outputs: Float[Array, 'B S C'],
    labels: Int[Array, 'B S'],
    mask: Bool[Array, 'B S'],
    label_smoothing: float | Float[Array, ''] = 0.0,
) -> tuple[Float32[Array, ''], Float32[Array, '']]:
    """Return the sum of the cross-entropies (nats) of what the mask selects, and its count.

    `label_smoothing` is the share of the target spread evenly over all classes, 0 to 1 (Szegedy et
    al. 2016, section 7).

    Raises:
        ValueError: a label smoothing outside 0 to 1.
    """
    check_smoothing(label_smoothing)

    def cross_entropy(
        logits: Float32[Array, 'B S C'], labels: Int[Array, 'B S']
    ) -> Float32[Array, 'B S']:
        log_p = jax.nn.log_softmax(logits)
        of_label = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
        return -(1 - label_smoothing) * of_label - label_smoothing * log_p.mean(-1)

    return masked_sum(cross_entropy, outputs, labels, mask)
