"""The optimiser of every method: AdamW with warm-up, decay by path, and clipping.

It is only ever given the trainable tree, so moments, clipping and decay exist for trained leaves
alone. Learning rate and weight decay may be traced scalars, so that `jax.vmap` can train a
population whose members differ in them.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from adapters_jax import params

# Biases and learned scales, those of LayerNorms among them, are not pulled towards zero.
NO_DECAY = (r'(.*/)?bias', r'(.*/)?((input_)?scale|scaling|magnitude)')

_SHAPES: dict[str, Callable[[int], optax.Schedule]] = {
    'linear': lambda steps: optax.linear_schedule(1.0, 0.0, steps),
    'cosine': lambda steps: optax.cosine_decay_schedule(1.0, steps),
    'constant': lambda steps: optax.constant_schedule(1.0),
}

Scalar = float | Float[Array, '']
_AT_A_TIME = 4096  # steps


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated; the defaults are those of Houlsby et al. (2019).

    `warmup` is the share of all steps during which the learning rate rises from zero; then it
    falls to zero ('linear', 'cosine') or stays. Leaves whose whole '/'-joined path matches one of
    `decay_exclude` have no weight decay. `clip_norm` bounds the global norm of the gradient (0: no
    bound). `bias_correction=False` is the Adam that BERT and adapter-bert were trained with.

    Raises:
        ValueError: a value out of its range.
    """

    learning_rate: float = 3e-4
    schedule: str = 'linear'
    warmup: float = 0.1
    weight_decay: float = 0.01
    decay_exclude: tuple[str, ...] = NO_DECAY
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-6
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.decay_exclude, str):
            raise ValueError(
                f'decay_exclude is a list of regular expressions, got the string '
                f'{self.decay_exclude!r}: write [{self.decay_exclude!r}]'
            )
        object.__setattr__(self, 'decay_exclude', tuple(self.decay_exclude))
        if self.schedule not in _SHAPES:
            raise ValueError(f'schedule must be one of {list(_SHAPES)}, got {self.schedule!r}')
        self._require('learning_rate', 'a finite number above 0', lambda x: 0 < x < math.inf)
        self._require('warmup', 'a share of all steps in [0, 1)', lambda x: 0 <= x < 1)
        self._require('weight_decay', 'a finite number of at least 0', lambda x: 0 <= x < math.inf)
        self._require('clip_norm', 'at least 0 (0: no clipping)', lambda x: 0 <= x < math.inf)
        self._require('b1', 'in [0, 1)', lambda x: 0 <= x < 1)
        self._require('b2', 'in [0, 1)', lambda x: 0 <= x < 1)
        self._require('epsilon', 'a finite number above 0', lambda x: 0 < x < math.inf)
        for pattern in self.decay_exclude:
            _check_pattern(pattern)

    def _require(self, name: str, expected: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not holds(value):
            raise ValueError(f'{name} must be {expected}, got {value!r}')


def make_schedule(
    config: OptimizerConfig, total_steps: int, learning_rate: Scalar | None = None
) -> Callable[[Int[Array, ''] | int], Float[Array, '']]:
    """Return the learning rate of each step, counted from 0; it peaks after the warm-up.

    Raises:
        ValueError: `total_steps` is not a positive number.
    """
    if total_steps < 1:
        raise ValueError(f'total_steps must be at least 1, got {total_steps}')
    peak = config.learning_rate if learning_rate is None else learning_rate
    warmup_steps = int(round(config.warmup * total_steps, 6))  # 0.29 of 100 are 29
    shape = _SHAPES[config.schedule](total_steps - warmup_steps)
    if warmup_steps:
        rise = optax.linear_schedule(0.0, 1.0, warmup_steps)
        shape = optax.join_schedules([rise, shape], [warmup_steps])
    return lambda step: jnp.asarray(peak * shape(step), jnp.float32)


class Rates:
    """The learning rates of steps, for those who want to know: many are computed at a time.

    A rate that is asked for while a device takes a step would be computed, and read, after it.
    """

    def __init__(self, schedule: Callable[..., Float[Array, '...']]) -> None:
        self._compute = jax.jit(jax.vmap(schedule))
        self._first, self._known = 0, np.zeros(0, np.float32)

    def __call__(self, step: int) -> Float[np.ndarray, '...']:
        """Return the rate of a step, counted from 0."""
        if not 0 <= step - self._first < len(self._known):
            self._first = step
            self._known = np.asarray(self._compute(np.arange(step, step + _AT_A_TIME)))
        return self._known[step - self._first]


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    learning_rate: Scalar | None = None,
    weight_decay: Scalar | None = None,
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter, 2019) over a tree of trainable parameters.

    `learning_rate` and `weight_decay` take the place of the config's and may be traced scalars.
    Moments and updates are float32 whatever the dtype of parameters and gradients.

    Raises:
        ValueError: `total_steps` is not a positive number.
    """
    schedule = make_schedule(config, total_steps, learning_rate)
    decay = config.weight_decay if weight_decay is None else weight_decay
    adam = optax.scale_by_adam if config.bias_correction else scale_by_uncorrected_adam
    stages = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(decay, mask=lambda tree: decay_mask(config, tree)),
        optax.scale_by_schedule(lambda step: -schedule(step)),
    ]
    return _in_float32(optax.chain(*stages))


def decay_mask(config: OptimizerConfig, tree: Any) -> Any:
    """Return a tree of booleans: which leaves weight decay applies to."""
    patterns = [re.compile(pattern) for pattern in config.decay_exclude]

    def decays(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        return not any(pattern.fullmatch(name) for pattern in patterns)

    return jax.tree_util.tree_map_with_path(decays, tree)


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Return Adam without bias correction: the AdamWeightDecayOptimizer of BERT's original code."""
    initial = optax.scale_by_adam(b1, b2, eps)

    def update(gradients: Any, state: optax.ScaleByAdamState, _: Any = None) -> tuple[Any, Any]:
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=state.count + 1, mu=mu, nu=nu)

    return optax.GradientTransformation(initial.init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let `inner` see float32 only: half precision would round its moments and decay away."""

    def update(gradients: Any, state: Any, trainable: Any) -> tuple[Any, Any]:
        wide = params.cast(trainable, jnp.float32)
        return inner.update(params.cast(gradients, jnp.float32), state, wide)

    return optax.GradientTransformation(
        lambda tree: inner.init(params.cast(tree, jnp.float32)), update
    )


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f'decay_exclude holds {pattern!r}, which is no regular expression: {error}'
        ) from error
