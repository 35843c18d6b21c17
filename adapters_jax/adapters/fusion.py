"""AdapterFusion: several adapters' outputs, mixed by an attention that is trained over them.

At each place where the adapters act, the query is the sub-layer's output and keys and values are
what each adapter adds (Pfeiffer et al. 2021, section 3.2). The adapters themselves stay unchanged.
Options have the names and the defaults that the `adapters` library gives them.
"""

import dataclasses
import functools
import re
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import fields, parts
from adapters_jax.params import Tree, flatten, map_with_path
from adapters_jax.sites import SUB_LAYERS

_PROJECTIONS = ('query', 'key', 'value')
_HOT, _COOLING = 50.0, 0.05  # the temperature at first, and what it loses in a step
_PULL = 0.01  # weight of the regulariser


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How adapters are mixed; the defaults are those that `adapters` calls 'dynamic'."""

    architecture: ClassVar[str] = 'fusion'

    query: bool = True
    key: bool = True
    value: bool = True
    query_before_ln: bool = False
    regularization: bool = True  # pull the value projection towards the identity
    residual_before: bool = False
    temperature: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True  # the value projection starts as the identity
    dropout_prob: float | None = None  # None: none

    def __post_init__(self) -> None:
        """Check the type of every field.

        Raises:
            ValueError: a value of another type, or a dropout rate that is none.
        """
        fields.check('fusion', self)
        if not 0 <= (self.dropout_prob or 0.0) < 1:
            raise ValueError(f'fusion: dropout_prob={self.dropout_prob} is not in [0, 1)')

    @property
    def shape(self) -> dict[str, tuple[str, ...]]:
        """Return the leaves of each projection that there is."""
        leaves = {'query': ('kernel', 'bias'), 'key': ('kernel', 'bias'), 'value': ('kernel',)}
        chosen = {name: leaves[name] for name in _PROJECTIONS if getattr(self, name)}
        return chosen or {'dense': ('kernel', 'bias')}  # a score of its own, which nothing reads


STATIC = FusionConfig(value=False, regularization=False, value_initialized=False)
PRESETS = {'dynamic': FusionConfig(), 'static': STATIC}


class Mixed(NamedTuple):
    """What a fusion returns; `weights` say how much each of N adapters has in each position."""

    output: Float[Array, 'B T D']
    weights: Float[Array, 'B T N']


def init(key: PRNGKeyArray, hidden: int, config: FusionConfig) -> Tree:
    """Return the fresh parameters of one place."""
    keys = dict(zip(('query', 'key', 'value', 'dense'), jax.random.split(key, 4), strict=True))
    draw = parts.normal(0.02)
    tree = {
        name: parts.dense(keys[name], draw, hidden, 1 if name == 'dense' else hidden)
        for name in config.shape
    }
    if 'value' in tree:
        identity = jnp.where(jnp.eye(hidden, dtype=bool), 1.0, 1e-6)
        tree['value'] = {
            'kernel': identity if config.value_initialized else tree['value']['kernel']
        }
    if config.temperature:
        tree['temperature'] = jnp.full((), _HOT)
    return tree


def mix(
    params: Tree,
    query: Float[Array, 'B T D'],
    ups: Float[Array, 'B T N D'],
    residual: Float[Array, 'B T D'],
    config: FusionConfig,
    key: PRNGKeyArray | None,
) -> Mixed:
    """Mix what N adapters add by their agreement with the query (section 3.2, eq. 3 to 7).

    Dropout is that of the scores. The softmax runs in float32.
    """
    if config.residual_before:
        ups = ups + residual[:, :, None]
    projected = {'query': query, 'key': ups, 'value': ups}
    for name in _PROJECTIONS:
        early = name != 'value' or config.value_before_softmax
        if getattr(config, name) and early:
            projected[name] = parts.apply_dense(params[name], projected[name])
    # Sums over all features, without a divisor: 16 bits would round what the softmax tells apart.
    exact = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = exact('BTD,BTND->BTN', projected['query'], projected['key'])
    scores = functional.dropout(scores, config.dropout_prob or 0.0, key)
    if config.temperature:
        scores = scores / jax.lax.stop_gradient(params['temperature'])
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum('BTN,BTND->BTD', weights.astype(ups.dtype), projected['value'])
    if config.value and not config.value_before_softmax:
        mixed = parts.apply_dense(params['value'], mixed)
    return Mixed(mixed if config.residual_before else mixed + residual, weights)


def penalty(tree: Tree, config: FusionConfig) -> Float[Array, ''] | None:
    """Return the squared distance of all value projections from the identity, times 0.01.

    Pfeiffer et al. 2021, section 3.2: it keeps what the adapters add from being distorted.
    """
    kernels = [x for path, x in flatten(tree).items() if path.endswith('value/kernel')]
    if not (config.regularization and config.value and kernels):
        return None
    return _PULL * sum(jnp.square(x - jnp.eye(len(x))).sum() for x in kernels)


class CoolingState(NamedTuple):
    """The inner optimiser's state beside the number of steps taken."""

    inner: Any
    step: Any


def cool(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `inner` with every temperature lowered from 50 to 1 by 0.05 a step.

    In `adapters` the temperature belongs to the running program, so it is 50 again in a model that
    was trained and loaded; as a leaf it is part of checkpoints and files.
    """

    def update(gradients: Any, state: CoolingState, trainable: Any) -> tuple[Any, CoolingState]:
        updates, inner_state = inner.update(gradients, state.inner, trainable)
        step = state.step + 1
        target = jnp.maximum(_HOT - _COOLING * step, 1.0)
        now = flatten(trainable)

        def lower(path: str, change: Any) -> Any:
            return target - now[path] if is_temperature(path) else change

        return map_with_path(lower, updates), CoolingState(inner_state, step)

    return optax.GradientTransformation(
        lambda tree: CoolingState(inner.init(tree), jnp.zeros((), jnp.int32)), update
    )


def is_temperature(path: str) -> bool:
    """Tell whether a leaf is a fusion's temperature."""
    return re.search(r'(^|/)fusion/.*/temperature$', path) is not None


def place_key(key: PRNGKeyArray | None, layer: int, name: str) -> PRNGKeyArray | None:
    """Return the random key of a place."""
    return functional.fold(key, layer, SUB_LAYERS.index(name))
