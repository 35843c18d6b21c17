"""Where each leaf of an adapter's parameters lies among the tensors of an AdapterHub file.

A table is made from the leaves that the method asks for, so that a file is compared with exactly
what it should hold, in its own names. Names are those inside of the backbone, without `bert.`.
"""

import re
from collections.abc import Callable, Iterable

from adapters_jax.adapters.method import Method
from adapters_jax.adapters.vera import VeRA
from adapters_jax.interop import modules
from adapters_jax.interop.adapterhub import places, special
from adapters_jax.interop.adapterhub.entry import Entry, column, dense, same, turned
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.sites import SUB_LAYERS

_AT_SITE = re.compile(rf'(layer_(\d+)/({"|".join(SUB_LAYERS)}))/(.+)')
_AT_PROJECTION = re.compile(rf'(layer_\d+/\w+/(?:{"|".join(places.PROJECTIONS)}))/(.+)')
_INVERTIBLE = re.compile(r'embeddings/(\w+)/(down|up)/(kernel|bias)')


def table(method: Method, paths: Iterable[str], name: str, config: BackboneConfig) -> list[Entry]:
    """Return the entries of an adapter with these leaves.

    Raises:
        ValueError: a leaf, or a method, for which the library has no place in this family.
    """
    paths = list(paths)
    if method.architecture not in _TABLES:
        raise ValueError(
            f'the format of `adapters` has no place for the method {method.architecture!r}; it has '
            f'{", ".join(_TABLES)}'
        )
    places.check(method, config)
    entries = _TABLES[method.architecture](method, paths, name, config)
    placed = {path for entry in entries for path in entry.ours}
    lost = [path for path in paths if path not in placed]
    if lost:
        raise ValueError(f'the format of `adapters` has no place for {", ".join(lost[:5])}')
    return entries


def _bottleneck(
    method: Method, paths: Iterable[str], name: str, config: BackboneConfig
) -> list[Entry]:
    """Return the table of a bottleneck (`methods/modeling.py`, class Adapter)."""
    found = (_AT_SITE.fullmatch(path) for path in paths)
    return [
        _bottleneck_leaf(
            match[1],
            f'{places.end(int(match[2]), match[3], config)}.adapters.{name}',
            match[4],
            int(method.ln_before),
        )
        for match in found
        if match
    ]


def _bottleneck_leaf(ours: str, theirs: str, rest: str, first: int) -> Entry:
    """Return the entry of one leaf; `first` counts the modules before the down-projection."""
    part, _, leaf = rest.partition('/')
    if part == 'scaling':
        return same(f'{ours}/scaling', f'{theirs}.scaling')
    if part in ('norm_before', 'norm_after'):
        tensor = {'scale': 'weight', 'bias': 'bias'}[leaf]
        # The norm before is a module of its own and the first one of the down-projection's.
        copies = [f'{theirs}.adapter_down.0.{tensor}'] if part == 'norm_before' else []
        return same(f'{ours}/{rest}', f'{theirs}.adapter_{part}.{tensor}', *copies)
    module = {'down': f'adapter_down.{first}', 'up': 'adapter_up', 'gate': 'gate'}[part]
    return dense(f'{ours}/{part}', f'{theirs}.{module}', leaf)


def _projections(
    method: Method, paths: Iterable[str], name: str, config: BackboneConfig
) -> list[Entry]:
    """Return the table of the methods that act on projections (`methods/lora.py`)."""
    kinds = _VERA if isinstance(method, VeRA) else _LOW_RANK
    entries = [
        turned(path, f'shared_parameters.{name}.lora_{path[-1].upper()}')
        for path in paths
        if path in ('constants/a', 'constants/b')
    ]
    for path in paths:
        match = _AT_PROJECTION.fullmatch(path)
        if match and match[2] in kinds:
            theirs = f'{modules.by_path(config)[match[1]]}.loras.{name}'
            tensor, convert = kinds[match[2]]
            entries.append(convert(path, f'{theirs}.{tensor}'))
    return entries


# Leaves at a projection: the tensor's name, and how the one becomes the other.
_LOW_RANK: dict[str, tuple[str, Callable[[str, str], Entry]]] = {
    'a': ('lora_A', turned),
    'b': ('lora_B', turned),
    'magnitude': ('m.weight', column),
    'scale': ('lora_B', column),
    'gate/kernel': ('gate.weight', turned),
    'gate/bias': ('gate.bias', same),
    'weights': ('weights', same),
    'task/values': ('task_specific.values', same),
    'task/matrix': ('task_specific.values', same),
}
# Of VeRA, whose vectors are the diagonals of square matrices there.
_VERA = _LOW_RANK | {'d': ('vera_D', same), 'b': ('vera_B', same)}


def _compacter(
    method: Method, paths: Iterable[str], name: str, config: BackboneConfig
) -> list[Entry]:
    """Return the table of a bottleneck of PHM layers (`class PHMLayer`)."""
    entries, plain = [], []
    for path in paths:
        shared, own = _PHM_SHARED.fullmatch(path), _PHM.fullmatch(path)
        if shared:
            place = f'_{shared[1]}' if shared[1] else ''
            tensor = _phm_tensor(shared[2], place)
            entries.append(same(path, f'shared_parameters.{name}.{tensor}'))
        elif own:
            theirs = f'{places.end(int(own[1]), own[2], config)}.adapters.{name}'
            module = f'adapter_down.{int(method.ln_before)}' if own[3] == 'down' else 'adapter_up'
            entries.append(same(path, f'{theirs}.{module}.{_phm_tensor(own[4])}'))
        else:
            plain.append(path)
    return entries + _bottleneck(method, plain, name, config)


_PHM = re.compile(rf'(?:constants/)?layer_(\d+)/({"|".join(SUB_LAYERS)})/(down|up)/(.+)')
_PHM_SHARED = re.compile(
    r'(?:shared|constants)/(?:(down|up)/)?((?:rule/)?(?:left|right|weight|rule))'
)


def _phm_tensor(leaf: str, place: str = '') -> str:
    """Return the name of a tensor of a PHM layer; what is shared says of which projection."""
    if leaf == 'bias':
        return 'b'
    kind, _, factor = leaf.rpartition('/')
    if 'rule' in leaf:
        return f'phm_rule_{factor}' if kind else 'phm_rule'
    return f'W{place}' if factor == 'weight' else f'W{place}_{factor}'


def _prompt(method: Method, paths: Iterable[str], name: str, config: BackboneConfig) -> list[Entry]:
    tensor = f'prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight'
    return [same('embeddings/prompt', tensor)]


def _invertible(
    method: Method, paths: Iterable[str], name: str, config: BackboneConfig
) -> list[Entry]:
    """Return the table of an invertible adapter: two networks (`class NICECouplingBlock`)."""
    found = (_INVERTIBLE.fullmatch(path) for path in paths)
    return [
        dense(
            f'embeddings/{m[1]}/{m[2]}',
            f'{places.embeddings(config)}invertible_adapters.{name}.{_NETWORKS[m[1]]}.'
            f'{("down", "up").index(m[2]) * 2}',
            m[3],
        )
        for m in found
        if m
    ]


_NETWORKS = {'f': 'F', 'g': 'G', 's1': 's1', 's2': 's2'}

_TABLES: dict[str, Callable[[Method, Iterable[str], str, BackboneConfig], list[Entry]]] = {
    'bottleneck': _bottleneck,
    'compacter': _compacter,
    'lora': _projections,
    'dora': _projections,
    'ia3': _projections,
    'vera': _projections,
    'dvora': _projections,
    'mtl_lora': _projections,
    'prefix_tuning': lambda _, paths, name, config: special.prefix_tuning(paths, name, config),
    'prompt_tuning': _prompt,
    'invertible': _invertible,
    'reft': lambda method, paths, name, config: special.reft(
        paths, name, config, method.orthogonality
    ),
}
