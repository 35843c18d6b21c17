"""What a run would hold and send on a mesh, found by compiling it without data or weights.

Trees are shapes, laid out by the very code that lays out a run's arrays (`state.prepare`); the step
and the forward pass are compiled as they would be before the first step, and their text is read.
"""

import dataclasses
import importlib.util
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from adapters_jax import sharding
from adapters_jax.config import Config
from adapters_jax.data import policies, tokenize
from adapters_jax.data.encoded import TAGS
from adapters_jax.interop.backbones import describe_backbone
from adapters_jax.params import Tree
from adapters_jax.training import batching, collectives, cutting, fitting, flops, loop
from adapters_jax.training.experiment import Experiment, check_numbers, make_model, make_task
from adapters_jax.training.members import load as load_members
from adapters_jax.training.placement import Described, make_mesh
from adapters_jax.training.state import Start, prepare

_LOG = logging.getLogger(__name__)
# Steps of a run of which only the data would say how many: more than a method's schedule needs.
_MANY = 10**6


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a run's programs take, as shapes with shardings."""

    experiment: Experiment
    placement: Described
    start: Start
    batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def held(self) -> dict[str, Any]:
        """The trees that a device holds a part of, by what they are."""
        start = self.start
        return {
            'frozen': start.frozen,
            'trainable': start.trainable,
            'optimiser': start.opt_state,
            'batch': self.batch,
        }


def topology(name: str) -> Sequence[Any]:
    """Return the devices of a TPU topology such as 'v5e:4x4', none of which need be at hand.

    Raises:
        ValueError: a topology that there is not, or the TPU compiler is not installed.
    """
    if not name.startswith('v'):
        raise ValueError(
            f'--topology={name}: expected a TPU topology such as v5e:4x4; for GPUs JAX compiles '
            'only on a machine that has one, so run this command there, without --topology'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError(
            f'--topology={name}: the TPU compiler is not here; install the libtpu that belongs to '
            f'JAX {jax.__version__}: pip install "jax[tpu]=={jax.__version__}"'
        )
    # The compiler would ask Google Cloud's metadata server what machine this is, and wait for it.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
    except RuntimeError as error:
        raise ValueError(
            f'--topology={name} is none that the TPU compiler knows '
            f'({str(error).partition(chr(10))[0]}); expected a generation and its chips, such as '
            'v5e:4x4, v5p:2x2x2 or v4:2x2x1'
        ) from error


def plan(
    config: Config,
    devices: Sequence[Any] | None = None,
    length: int = 0,
    texts: int = 1,
    labels: int = 0,
) -> Plan:
    """Lay out a run's trees over `devices` (default: JAX's).

    A batch has `training.batch_size` rows of `length` tokens (0: `data.max_length`), each of which
    holds up to `texts` texts, and is cut into parts if `training.accumulate` says so. `labels` is
    the number of classes where the config does not name them (0: 2).

    Raises:
        ValueError, FileNotFoundError: the first mistake found, in one sentence.
    """
    if config.tasks:
        raise ValueError(
            f'the config has several tasks ({", ".join(config.tasks)}), but only a run of a single '
            'task is compiled; give the config of one of them'
        )
    check_numbers(config)
    placement = Described.of(config, make_mesh(config, devices))
    loop.check(config, placement)
    if config.training.trunk_cache != 'none':
        _LOG.warning(
            'training.trunk_cache is %r, from which a step reads the outputs of lower layers; what '
            'is compiled here computes them',
            config.training.trunk_cache,
        )
    experiment = _experiment(config, labels)
    tree = jax.eval_shape(_initialiser(experiment), experiment.backbone.params)
    steps, parts = config.training.steps or _MANY, config.training.accumulate or 1
    start = prepare(experiment, tree, placement, steps, parts)
    return Plan(experiment, placement, start, _batch(experiment, placement, length, texts))


def _experiment(config: Config, labels: int) -> Experiment:
    """Return the parts of a run, with shapes for the backbone and without any split."""
    members = load_members(config)
    backbone = describe_backbone(config.backbone)
    if not config.task.labels:
        names = [f'label {i}' for i in range(labels or 2)]
        if config.task.positive:
            names[-1:] = [config.task.positive]
        config = config.copy_and_resolve_references()
        config.task.labels = tuple(names)
    task = make_task(config, None)
    fitting.check_input(task, backbone)
    task = task.fitted(backbone.config, None)
    if task.writes:  # what an evaluation scores by: how texts are written, only a tokenizer tells
        task = dataclasses.replace(task, metric_names=('nll',), primary='')
    model = make_model(config, members, task, backbone)
    return Experiment(config, backbone, task, model, {}, {}, members)


def _initialiser(experiment: Experiment) -> Any:
    def init(backbone: Tree) -> Tree:
        loaded = dataclasses.replace(experiment.backbone, params=backbone)
        return dataclasses.replace(experiment, backbone=loaded).init_params()

    return init


def _batch(
    experiment: Experiment, placement: Described, length: int, texts: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the columns of a batch as `data.batches.assemble` makes them."""
    config, limit = experiment.config, experiment.model.text_positions
    parts = config.training.accumulate or 1
    rows = batching.filled_rows(config, config.training.batch_size, placement.row_parts, parts)
    names = ['input_ids', 'token_type_ids', 'positions', 'segments']
    names += [TAGS] if experiment.model.method.known_tags else []
    if experiment.task.reads != 'input_ids':
        # An example fills a row, whose length is that of what is to be written, if anything.
        names, texts = [], 1
        length = length if experiment.task.writes else 1
    else:  # as when texts are read, whose tokenizer takes a few tokens more
        tokenize.check_length(config.data.max_length, limit, special=0)
    length = length or config.data.max_length
    if not 1 <= texts <= max(length, 1):
        raise ValueError(f'a row has {texts} texts; expected 1 to {max(length, 1)}, its tokens')
    longest = max(limit or 0, policies.longest_row(config.data.max_length))
    # An example of several texts is as long as all of them, and lies in one row.
    if limit is not None and length > longest and not experiment.task.several_texts:
        raise ValueError(
            f'a row has {length} tokens; expected {longest} at most: the {limit} positions of the '
            'backbone, or twice data.max_length (256 or more) where texts share a row'
        )
    tokens = dict.fromkeys(names, jnp.int32)
    per_text = {'starts': jnp.int32, 'example_mask': bool, 'example_id': jnp.int32}
    shapes = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in tokens.items()}
    shapes |= {name: jax.ShapeDtypeStruct((rows, texts), dtype) for name, dtype in per_text.items()}
    shapes |= experiment.task.batch_shapes(rows, length, texts)
    where = sharding.by_rows(placement.mesh)
    return sharding.describe(shapes, jax.tree.map(lambda _: where, shapes))


def trace_step(plan: Plan) -> jax.stages.Traced:
    """Trace the step that training takes."""
    start, number = plan.start, jax.ShapeDtypeStruct((), jnp.int32)
    key = plan.placement.put(jax.eval_shape(lambda: start.key))
    number = plan.placement.put(number)
    return start.train_step.trace(
        start.trainable, start.opt_state, start.frozen, plan.batch, key, number
    )


def trace_forward(plan: Plan) -> jax.stages.Traced:
    """Trace the forward pass of an evaluation, on a batch of training."""
    with cutting.into(1):
        return plan.start.forward.trace(plan.start.trainable, plan.start.frozen, plan.batch)


# Simulated devices run nothing, so their programs need not be fast.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def measure(
    traced: jax.stages.Traced, mesh: Mapping[str, int], other: str = 'update', quick: bool = False
) -> dict[str, Any]:
    """Compile a program and return what it costs a device, as JSON values.

    `memory` is in bytes, `collectives` as `summarise` returns. `flops` are those of one device, of
    all passes of a loop; kernels of attention (on a GPU) count nothing. `quick` leaves out what the
    CPU's compiler does after everything is known that is returned here.
    """
    lowered, started = traced.lower(), time.monotonic()
    compiled = lowered.compile(compiler_options=QUICK if quick else None)
    seconds = time.monotonic() - started
    counted = (compiled.cost_analysis() or {}).get('flops', 0.0)
    memory, found = compiled.memory_analysis(), collectives.read(compiled.as_text())
    return {
        'seconds': round(seconds, 2),
        'memory': {
            name: getattr(memory, f'{name}_size_in_bytes')
            for name in ('argument', 'output', 'alias', 'temp')
        },
        'flops': counted * flops.in_loops(traced.jaxpr),
        'sent': collectives.total(found),
        'collectives': collectives.summarise(found, mesh, other),
    }


def report(plan: Plan) -> dict[str, Any]:
    """Compile the step and the forward pass; return what they hold, compute and send a device."""
    mesh = dict(plan.placement.mesh.shape)
    quick = plan.placement.mesh.devices.flat[0].platform == 'cpu'
    rows, texts = plan.batch['example_id'].shape
    words = plan.batch.get('input_ids')
    length = plan.experiment.model.config.positions if words is None else words.shape[1]
    return {
        'backbone': plan.experiment.config.backbone,
        'method': plan.experiment.config.method,
        'mesh': mesh,
        'device': plan.placement.mesh.devices.flat[0].device_kind,
        'rows': rows,
        'length': length,
        'texts': texts,
        'held': {name: sharding.bytes_per_device(tree) for name, tree in plan.held.items()},
        'step': measure(trace_step(plan), mesh, quick=quick),
        'forward': measure(trace_forward(plan), mesh, 'forward pass', quick),
    }


def shardings(plan: Plan) -> str:
    """Return one line for every leaf: path, number format, shape, where it lies, bytes a device."""
    lines = []
    for name, tree in plan.held.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        lines.append(f'# {name}: {sharding.bytes_per_device(tree):,} bytes a device')
        for path, leaf in leaves:
            named = jax.tree_util.keystr(path, simple=True, separator='/')
            shape = ', '.join(map(str, leaf.shape))
            spec = ', '.join(map(_axes, leaf.sharding.spec))
            size = sharding.bytes_per_device(leaf)
            lines.append(f'{name}/{named} {leaf.dtype}[{shape}] ({spec}) {size}')
    return '\n'.join(lines) + '\n'


def _axes(axis: str | tuple[str, ...] | None) -> str:
    return '-' if axis is None else axis if isinstance(axis, str) else '+'.join(axis)
