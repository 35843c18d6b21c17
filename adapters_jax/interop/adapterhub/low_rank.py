"""LoRA, DoRA, VeRA and (IA)³ of the library as ours: one configuration there, four methods here.

The methods agree but for factors, which go into the trained arrays: the library leaves `alpha / r`
out where there is a gate, has an alpha for VeRA and (IA)³, and trains VeRA's vectors as matrices.
`finish` makes our form of what was read, `start` the library's form of what is to be written.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax import params as trees
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.low_rank import LowRank
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.adapters.vera import DVoRA, VeRA, as_lora
from adapters_jax.interop.adapterhub.schema import LoRAConfig, MTLLoRAConfig
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions

_LETTERS = {'q': 'query', 'k': 'key', 'v': 'value'}
_SHARED = (
    'r',
    'attn_matrices',
    'selfattn_lora',
    'intermediate_lora',
    'output_lora',
    'dropout',
    'use_gating',
    'leave_out',
    'init_weights_seed',
)
_MTL = ('n_up_projection', 'task_specific_matrix_type', 'weights_sharpness')
# What the library's DoRA does, and no option of it says.
_THEIR_DORA = {'scale_bias': True, 'detach_norm': False}


SCHEMAS = (LoRAConfig, MTLLoRAConfig)
METHODS = (LowRank, IA3)


def read(config: LoRAConfig) -> LowRank | IA3:
    """Return the method; what depends on the tensors is left to `finish`."""
    if isinstance(config, MTLLoRAConfig):
        return _read_mtl(config)
    if config.composition_mode == 'scale':
        return _read_ia3(config)
    shared = {name: getattr(config, name) for name in _SHARED}
    shared['crossattn_lora'] = config.selfattn_lora  # of one kind there
    if isinstance(config.vera_d, float) or isinstance(config.vera_b, float):
        own = {'d_initial': config.vera_d or 0.0, 'b_initial': config.vera_b or 0.0}
        own['save_projection'] = True
        return DVoRA(**shared, **own, **_THEIR_DORA) if config.use_dora else VeRA(**shared, **own)
    own = {'alpha': config.r if config.use_gating else config.alpha}
    own['init_weights'] = 'bert' if config.init_weights == 'bert' else 'lora'
    if config.use_dora:
        return DoRA(**shared, **own, **_THEIR_DORA, scale_norm=False)
    return LoRA(**shared, **own)


def _read_mtl(config: MTLLoRAConfig) -> MTLLoRA:
    if config.composition_mode != 'add' or config.use_dora:
        raise ValueError(
            f'the config of an mtl_lora adapter has composition_mode={config.composition_mode!r} '
            f"and use_dora={config.use_dora}; expected 'add' and False"
        )
    return MTLLoRA(
        **{name: getattr(config, name) for name in (*_SHARED, *_MTL)},
        crossattn_lora=config.selfattn_lora,
        alpha=config.r if config.use_gating else config.alpha,
        init_weights='bert' if config.init_weights == 'bert' else 'lora',
    )


def _read_ia3(config: LoRAConfig) -> IA3:
    for condition, said in (
        (config.r == 1, f'r={config.r}, expected 1'),
        (not config.use_dora, 'use_dora=true'),
        (config.dropout == 0, f'dropout={config.dropout}, expected 0'),
    ):
        if not condition:
            raise ValueError(f"the config has composition_mode='scale' with {said}")
    attention = [_LETTERS[x] for x in _LETTERS if x in config.attn_matrices]
    return IA3(
        scale_outputs=(
            *(attention if config.selfattn_lora else ()),
            *(['up'] if config.intermediate_lora else ()),
            *(['down'] if config.output_lora else ()),
        ),
        scale_inputs=(),
        use_gating=config.use_gating,
        leave_out=config.leave_out,
        init_weights_seed=config.init_weights_seed,
    )


def finish(config: LoRAConfig, method: LowRank | IA3, tree: Tree) -> tuple[LowRank | IA3, Tree]:
    """Return the method and its parameters in our form, of tensors in the library's."""
    scale = 1.0 if config.use_gating else config.alpha / config.r
    if isinstance(method, IA3):
        return method, _scaled(tree, 'scale', scale)
    if not isinstance(method, VeRA):
        return method, tree
    leaves = trees.flatten(tree)
    matrices = {path: x for path, x in leaves.items() if _is_vera_vector(path)}
    diagonal = all(np.array_equal(x, np.diag(np.diag(x))) for x in matrices.values())
    if diagonal and (scale == 1 or not config.use_dora):
        vectors = {path: np.diag(x).copy() for path, x in matrices.items()}
        return method, _scaled(trees.unflatten(leaves | vectors), 'b', scale)
    return _vera_as_lora(config, method, tree)


def _vera_as_lora(config: LoRAConfig, method: VeRA, tree: Tree) -> tuple[LoRA, Tree]:
    """Return the LoRA that a VeRA with full matrices is."""
    constants = tree['constants']
    leaves = {p: x for p, x in trees.flatten(tree).items() if not p.startswith('constants/')}
    for path in [path for path in leaves if path.endswith('/d')]:
        place = path.removesuffix('/d')
        factors = as_lora(
            constants['a'].T, constants['b'].T, leaves.pop(path), leaves.pop(f'{place}/b')
        )
        leaves |= {f'{place}/{name}': np.asarray(x) for name, x in factors.items()}
    plain = dataclasses.replace(config, vera_d=None, vera_b=None, init_weights='lora')
    return read(plain), trees.unflatten(leaves)


def start(method: LowRank | IA3, tree: Tree, dimensions: Dimensions) -> tuple[LoRAConfig, Tree]:
    """Return the configuration, and the parameters in the library's form.

    Raises:
        ValueError: an option for which the library has no place.
    """
    if isinstance(method, IA3):
        return _write_ia3(method, dimensions), tree
    crossed = dimensions.decoder_layers > 0 and method.crossattn_lora != method.selfattn_lora
    _refuse(crossed, method, 'crossattn_lora apart from selfattn_lora')
    _refuse(method.gate_lora and dimensions.gated, method, 'gate_lora')
    _refuse('o' in method.attn_matrices, method, "attn_matrices with 'o'")
    if isinstance(method, MTLLoRA):
        return _start_mtl(method, tree)
    if not isinstance(method, LoRA | VeRA):
        raise ValueError(
            f'`adapters` has no method {method.architecture!r}; keep the adapter in the format of '
            'this project'
        )
    if isinstance(method, DVoRA | DoRA):
        _refuse(not method.scale_bias, method, 'scale_bias=False')
    if isinstance(method, VeRA):
        return _start_vera(method, tree, dimensions)
    return _start_lora(method, tree, dimensions)


def _start_lora(method: LoRA, tree: Tree, dimensions: Dimensions) -> tuple[LoRAConfig, Tree]:
    places = [(p.layer, f'{p.sub_layer}/{p.name}') for p in method.places(dimensions)]
    ranks = {method.rank(*place) for place in places}
    _refuse(len(ranks) > 1, method, f'rank_pattern={dict(method.rank_pattern)}')
    (rank,) = ranks
    scales = {f'layer_{i}/{name}': method.scaling(i, name) for i, name in places}
    dora = isinstance(method, DoRA)
    # DoRA's norm without the scale is theirs; with it, the scale is as good as part of b.
    folded = method.use_gating or len(set(scales.values())) > 1 or (dora and method.scale_norm)
    _refuse(
        folded and dora and not method.scale_norm and set(scales.values()) != {1.0},
        method,
        'scale_norm=False with a gate or with several alphas',
    )
    if folded:
        leaves = trees.flatten(tree)
        leaves |= {f'{place}/b': leaves[f'{place}/b'] * x for place, x in scales.items()}
        tree, alpha = trees.unflatten(leaves), rank
    else:
        alpha = method.alpha if not _patterned(method) else rank * next(iter(scales.values()))
    shared = _shared(method) | {'r': rank}
    own = {'alpha': alpha, 'init_weights': method.init_weights, 'use_dora': dora}
    return LoRAConfig(**shared, **own), tree


def _start_mtl(method: MTLLoRA, tree: Tree) -> tuple[LoRAConfig, Tree]:
    own = {name: getattr(method, name) for name in (*_MTL, 'alpha', 'init_weights')}
    if method.use_gating:
        tree, own['alpha'] = _scaled(tree, 'b', method.alpha / method.r), method.r
    return MTLLoRAConfig(**_shared(method), **own), tree


def _patterned(method: LoRA) -> bool:
    """Whether alpha is something else than the option of that name says."""
    return bool(method.rank_stabilised or method.rank_pattern or method.alpha_pattern)


def _start_vera(method: VeRA, tree: Tree, dimensions: Dimensions) -> tuple[LoRAConfig, Tree]:
    widths = {place.sizes(dimensions) for place in method.places(dimensions)}
    _refuse(len(widths) > 1, method, 'projections of several widths')
    vectors = {p: np.diag(x) for p, x in trees.flatten(tree).items() if _is_vera_vector(p)}
    config = LoRAConfig(
        **_shared(method),
        alpha=method.r,
        init_weights='vera',
        use_dora=isinstance(method, DVoRA),
        vera_d=float(method.d_initial),
        vera_b=float(method.b_initial),
    )
    return config, trees.unflatten(trees.flatten(tree) | vectors)


def vera_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the leaves' shapes with a square matrix for each vector of VeRA."""
    return {p: shape * 2 if _is_vera_vector(p) else shape for p, shape in shapes.items()}


def _is_vera_vector(path: str) -> bool:
    return re.fullmatch(r'layer_\d+/\w+/\w+/[db]', path) is not None


def _write_ia3(method: IA3, dimensions: Dimensions) -> LoRAConfig:
    _refuse(bool(method.scale_inputs), method, f'scale_inputs={list(method.scale_inputs)}')
    known = {*_LETTERS.values(), 'up', 'down'}
    others = [name for name in method.scale_outputs if name not in known]
    _refuse(bool(others), method, f'scale_outputs with {", ".join(others)}')
    letters = [x for x, name in _LETTERS.items() if name in method.scale_outputs]
    kinds = [method.self_attention, *([method.cross_attention] * (dimensions.decoder_layers > 0))]
    _refuse(bool(letters) and not all(kinds), method, 'scales of one kind of attention alone')
    return LoRAConfig(
        selfattn_lora=bool(letters),
        intermediate_lora='up' in method.scale_outputs,
        output_lora='down' in method.scale_outputs,
        attn_matrices=letters or ('k', 'v'),
        r=1,
        alpha=1,
        composition_mode='scale',
        init_weights='ia3',
        use_gating=method.use_gating,
        leave_out=method.leave_out,
        init_weights_seed=method.init_weights_seed,
    )


def _shared(method: LowRank) -> dict[str, Any]:
    return {name: getattr(method, name) for name in _SHARED}


def _scaled(tree: Tree, name: str, scale: float) -> Tree:
    """Return the tree with every leaf of this name multiplied."""

    def multiply(path: str, leaf: np.ndarray) -> np.ndarray:
        own = path.rpartition('/')[2] == name and not path.startswith('constants/')
        return np.float32(scale) * leaf if own and scale != 1 else leaf

    return trees.map_with_path(multiply, tree)


def _refuse(condition: bool, method: LowRank | IA3, what: str) -> None:
    if condition:
        raise ValueError(
            f'{method.architecture}: `adapters` has no {what}, so the adapter cannot be written in '
            'its format; keep it in the format of this project'
        )
