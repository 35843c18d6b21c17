"""The methods whose tensors are not our leaves one by one: prefixes and orthogonal projections.

`adapters` keeps the prefixes of all layers in one tensor, and lists it once more under every layer;
it keeps an orthogonal projection as what torch's parametrisation makes it from.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from adapters_jax import params as trees
from adapters_jax.adapters.reft import ReFT, orthonormal, torch_parametrization
from adapters_jax.interop import modules
from adapters_jax.interop.adapterhub import places
from adapters_jax.interop.adapterhub.entry import Arrays, Entry, Shape, dense, same, turned
from adapters_jax.lazy import Functions
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

linalg = Functions('scipy.linalg')

_OWN = r'layer_(\d+)/(attention|cross_attention)/(?:decoder_)?prefix'
_PREFIX = re.compile(rf'{_OWN}/(key|value)(?:/(kernel|bias))?')
_GATE = re.compile(rf'({_OWN}/gate)/(kernel|bias)')
_SHARED = re.compile(r'shared/(\w+)/(embedding|down)(?:/(kernel|bias))?')
_INTERVENTION = re.compile(r'(layer_(\d+)/block)/(prefix|suffix)/(.+)')


def prefix_tuning(paths: Iterable[str], name: str, config: BackboneConfig) -> list[Entry]:
    """Return the table of prefix tuning (`methods/prefix_tuning.py` of the library).

    There is a group of prefixes for the encoder, one for the decoder and one for cross-attention.
    """
    table: list[Entry] = []
    joined: dict[tuple[str, str], list[str]] = {}
    for path in sorted(paths, key=_by_layer):
        if match := _GATE.fullmatch(path):
            own = modules.attention(int(match[2]), match[3], config)
            gate = f'{own}.prefix_tuning.prefix_gates.{name}'
            table.append(dense(match[1], gate, match[4]))
        elif match := _PREFIX.fullmatch(path):
            group = places.prefixes(int(match[1]), match[2], config)
            joined.setdefault((group, match[4] or 'flat'), []).append(path)
        elif match := _SHARED.fullmatch(path):
            table.append(_reparametrisation(path, match, f'{name}.{_group(match[1], config)}'))
    table += [
        _JOINED[leaf](tuple(found), f'{_POOL}.{name}.{group}', config.block.inner)
        for (group, leaf), found in joined.items()
    ]
    return [_with_copies(entry, config) for entry in table]


_POOL = 'prefix_tuning.prefix_tunings'


def _group(network: str, config: BackboneConfig) -> str:
    """Return the group of prefixes that a shared network is for."""
    if network == 'cross_attention':
        return places.prefixes(config.layers, network, config)
    layer = config.layers if network == 'decoder_prefix' else 0
    return places.prefixes(layer, 'attention', config)


def _by_layer(path: str) -> tuple[int, str]:
    """Sort by layer, then keys before values: the order of the rows of the joint tensor."""
    match = re.match(r'layer_(\d+)/', path)
    return (int(match[1]) if match else -1, path)


def _reparametrisation(path: str, match: re.Match[str], group: str) -> Entry:
    if match[2] == 'embedding':
        return same(path, f'{_POOL}.{group}.wte.weight')
    return dense(f'shared/{match[1]}/down', f'{_POOL}.{group}.control_trans.0', match[3])


def _flat(paths: tuple[str, ...], group: str, inner: int) -> Entry:
    """Join keys and values [P, D]: one vector, of [P, 2 * layers, D]."""

    def read(x: np.ndarray) -> Arrays:
        rows = x.reshape(-1, len(paths), inner)
        return tuple(rows[:, i] for i in range(len(paths)))

    def write(*leaves: np.ndarray) -> Arrays:
        return (np.stack(leaves, 1).reshape(-1),)

    def shapes(*leaves: Shape) -> tuple[Shape]:
        return ((len(leaves) * leaves[0][0] * leaves[0][1],),)

    names = (f'{group}.control_trans',)
    return Entry(paths, names, read, write, shapes=shapes)


def _kernels(paths: tuple[str, ...], group: str, inner: int) -> Entry:
    """Join the kernels [R, D] that make them: [2 * layers * D, R]."""

    def read(x: np.ndarray) -> Arrays:
        return tuple(part.T for part in np.split(x, len(paths)))

    def write(*leaves: np.ndarray) -> Arrays:
        return (np.concatenate([leaf.T for leaf in leaves]),)

    def shapes(*leaves: Shape) -> tuple[Shape]:
        return ((len(leaves) * leaves[0][1], leaves[0][0]),)

    names = (f'{group}.control_trans.2.weight',)
    return Entry(paths, names, read, write, shapes=shapes)


def _biases(paths: tuple[str, ...], group: str, inner: int) -> Entry:
    """Join their biases [D]: [2 * layers * D]."""

    def read(x: np.ndarray) -> Arrays:
        return tuple(np.split(x, len(paths)))

    def write(*leaves: np.ndarray) -> Arrays:
        return (np.concatenate(leaves),)

    return Entry(paths, (f'{group}.control_trans.2.bias',), read, write)


_JOINED = {'flat': _flat, 'kernel': _kernels, 'bias': _biases}


def _with_copies(entry: Entry, config: BackboneConfig) -> Entry:
    """Name the copies under each attention, also under those that have no prefix."""
    pools = [f'{module}.prefix_tuning.pool' for module in places.attentions(config)]
    copies = [
        (name.replace('prefix_tuning', pool, 1), name)
        for name in entry.theirs
        if name.startswith(f'{_POOL}.')
        for pool in pools
    ]
    return dataclasses.replace(entry, copies=tuple(copies))


def reft(paths: Iterable[str], name: str, config: BackboneConfig, orthogonal: bool) -> list[Entry]:
    """Return the table of ReFT (`methods/reft.py` of the library)."""
    table = []
    for path in paths:
        if (match := _INTERVENTION.fullmatch(path)) is None:
            continue
        unit = ('prefix', 'suffix').index(match[3])
        theirs = f'{modules.block(int(match[2]), config)}.reft_layer.refts.{name}.units.{unit}'
        if match[4] != 'projection':
            ours = f'{match[1]}/{match[3]}/source'
            table.append(dense(ours, f'{theirs}.learned_source', match[4].rpartition('/')[2]))
        elif orthogonal:
            table.append(_orthogonal(path, f'{theirs}.projection.parametrizations.weight'))
        else:
            table.append(turned(path, f'{theirs}.projection.weight'))
    return table


def with_subtraction(method: ReFT, tree: Tree) -> tuple[ReFT, Tree]:
    """Return the intervention that subtracts the projection and computes the same.

    The library cannot read DiReFT back: its files do not say that nothing is subtracted. But
    x + (Wx + b)R is x + (W'x + b - Rx)R with W' = W + R (Wu et al. 2024, eq. 2 and 3).

    Raises:
        ValueError: a non-linearity stands between the two.
    """
    if method.subtract_projection:
        return method, tree
    if method.non_linearity is not None:
        raise ValueError(
            'reft: `adapters` reads no subtract_projection=False, and with non_linearity='
            f'{method.non_linearity!r} no other intervention computes the same; keep the adapter '
            'in the format of this project'
        )
    leaves = trees.flatten(tree)
    for path in [path for path in leaves if path.endswith('/projection')]:
        kernel = f'{path.removesuffix("projection")}source/kernel'
        basis = orthonormal(jnp.asarray(leaves[path])) if method.orthogonality else leaves[path]
        leaves[kernel] = leaves[kernel] + np.asarray(basis)
    return dataclasses.replace(method, subtract_projection=True), trees.unflatten(leaves)


def _orthogonal(path: str, name: str) -> Entry:
    """Return the entry of a projection [D, R] that torch makes of two tensors."""

    def read(original: np.ndarray, base: np.ndarray) -> Arrays:
        return (from_parametrization(original, base),)

    def write(projection: np.ndarray) -> Arrays:
        return torch_parametrization(np.asarray(orthonormal(jnp.asarray(projection))).T)

    def shapes(shape: Shape) -> tuple[Shape, Shape]:
        return shape[::-1], (shape[0],) * 2

    names = (f'{name}.original', f'{name}.0.base')
    return Entry((path,), names, read, write, shapes=shapes)


def from_parametrization(original: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return the matrix [D, R] with orthonormal columns that torch's parametrisation stands for.

    `original` is [R, D] and `base` [D, D]. The matrix is `base` times a product of Householder
    reflections for R < D, and times a matrix exponential for R = D
    (`torch.nn.utils.parametrizations.orthogonal`).
    """
    x, base = original.T.astype(np.float64), base.astype(np.float64)
    if x.shape[0] == x.shape[1]:  # which torch does not transpose
        lower = np.tril(x.T)
        return (base @ linalg.expm(lower - lower.T)).T
    reflections = np.tril(x, -1) + np.eye(*x.shape)
    product = functools.reduce(_reflect, reflections.T[::-1], np.eye(*x.shape))
    return base @ (product * np.trunc(np.diag(x)).reshape(1, -1))


def _reflect(x: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Reflect the columns of `x` at the hyperplane with this normal."""
    return x - np.outer(normal, normal @ x) * (2 / (normal @ normal))
