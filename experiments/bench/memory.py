"""The memory of a training step, as the compiler counts it.

    python -m experiments.bench.memory --output=DIR [--shapes=base,large] [--rows=32] [--tokens=128]

Steps of full fine-tuning and of adapters are compiled for the shapes of BERT-base and BERT-large,
with the frozen backbone in each number format and with each policy of rematerialisation; no array
is made. Writes DIR/memory.json and DIR/memory.md.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from adapters_jax import entry, files, params, quantize, tasks, xla
from adapters_jax.adapters import registry
from adapters_jax.model import Batch, Model
from adapters_jax.models.backbone import CHANNELS, Backbone, BackboneConfig
from adapters_jax.models.bert import BertStem
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree
from adapters_jax.training.dtypes import DTYPES, FROZEN_DTYPES
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer
from adapters_jax.training.provenance import describe
from adapters_jax.training.step import jit_train_step
from experiments.bench.backbones import SHAPES
from experiments.output import where, write

TASK = tasks.create('classification', labels=('a', 'b'))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how its numbers are kept; the keys of `config.training`."""

    method: str
    frozen_dtype: str = 'float32'
    dtype: str = 'float32'
    remat: str = 'none'


SETTINGS = (
    Setting('full'),
    Setting('full', dtype='bfloat16'),
    Setting('full', remat='full'),
    Setting('houlsby'),
    Setting('pfeiffer'),
    Setting('lora'),
    Setting('houlsby', 'bfloat16'),
    Setting('houlsby', 'int8'),
    Setting('houlsby', 'bfloat16', 'bfloat16'),
    Setting('houlsby', 'int8', 'bfloat16'),
    Setting('houlsby', remat='dots'),
    Setting('houlsby', remat='full'),
    Setting('houlsby', 'bfloat16', remat='full'),
    Setting('houlsby', 'int8', remat='full'),
    Setting('houlsby', 'int8', 'bfloat16', 'full'),
)


def backbone_config(shape: str) -> BackboneConfig:
    """Return the config of BERT-base or BERT-large, uncased."""
    layers, *sizes = SHAPES[shape]
    return BackboneConfig(
        'bert', layers, 30522, 512, 0, BlockConfig(*sizes), BertStem(), pooler=True
    )


def abstract(tree: Any) -> Any:
    """Return the shapes of a tree as if its arrays lay on the first device."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def stored_as(tree: Tree, name: str) -> Tree:
    """Return the shapes of frozen leaves as `training.frozen_dtype` has them."""
    if name != 'int8':
        return jax.eval_shape(functools.partial(params.cast, dtype=FROZEN_DTYPES[name]), tree)

    def kept(path: str, leaf: Any) -> Any:
        axis = quantize.channel_axis(path, CHANNELS)
        to_int8 = functools.partial(quantize.to_int8, axis=axis)
        return leaf if axis is None else jax.eval_shape(to_int8, leaf)

    return params.map_with_path(kept, tree)


def batch_of(rows: int, tokens: int) -> Batch:
    """Return the shapes of a batch of one text a row."""
    names = ('input_ids', 'token_type_ids', 'positions', 'segments')
    batch = {name: jax.ShapeDtypeStruct((rows, tokens), jnp.int32) for name in names}
    one = {'starts': jnp.int32, 'label': jnp.int32, 'example_mask': jnp.bool_}
    return batch | {name: jax.ShapeDtypeStruct((rows, 1), kind) for name, kind in one.items()}


def compiled_step(config: BackboneConfig, setting: Setting, batch: Batch) -> tuple[Any, Tree, Tree]:
    """Return the compiled step, and the shapes of trainable and frozen leaves."""
    model = Model(
        config,
        registry.create(setting.method),
        HeadConfig(),
        TASK.num_outputs,
        dtype=DTYPES[setting.dtype],
        remat=setting.remat,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = functools.partial(Backbone(config).init, method='initialise')
    backbone = jax.eval_shape(init, key, ids)['params']
    tree = jax.eval_shape(model.init, key, backbone)
    trainable, frozen = params.partition(tree, model.rules)
    trainable, frozen = abstract(trainable), stored_as(frozen, setting.frozen_dtype)
    optimizer = model.method.optimizer(make_optimizer(OptimizerConfig(), 1000), 1000)
    state = abstract(jax.eval_shape(optimizer.init, trainable))
    step = jit_train_step(trainable, state, model=model, task=TASK, optimizer=optimizer)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = step.lower(trainable, state, frozen, batch, key, number)
    return lowered.compile(compiler_options=xla.options(lean=True)), trainable, frozen


def measure(config: BackboneConfig, setting: Setting, rows: int, tokens: int) -> dict[str, Any]:
    """Return a step's bytes: of its arguments, of new outputs, of temporaries, and their sum."""
    compiled, trainable, frozen = compiled_step(config, setting, batch_of(rows, tokens))
    found = compiled.memory_analysis()
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return dataclasses.asdict(setting) | {
        'trainable': params.count(trainable),
        'frozen_bytes': params.size_bytes(frozen),
        'arguments': arguments,
        'new_outputs': new,
        'temporary': temporary,
        # What the CPU's `peak_memory_in_bytes` says leaves out the temporaries.
        'peak': arguments + new + temporary,
    }


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    shapes = list(result['shapes'])
    titles = [f'{shape}: arguments | temporary | peak' for shape in shapes]
    lines = [
        f'| trained | frozen | activations | remat | {" | ".join(titles)} |',
        f'|---|---|---|---|{"---|" * 3 * len(shapes)}',
    ]
    for found in zip(*result['shapes'].values(), strict=True):
        first = found[0]
        cells = [f'`{first[key]}`' for key in ('method', 'frozen_dtype', 'dtype', 'remat')]
        if first['method'] == 'full':
            cells[1] = '-'
        for row, (least, *_) in zip(found, result['shapes'].values(), strict=True):
            cells += [f'{row[key] / 2**20:,.0f}' for key in ('arguments', 'temporary')]
            cells.append(f'{row["peak"] / 2**20:,.0f} ({row["peak"] / least["peak"]:.2f})')
        lines.append(f'| {" | ".join(cells)} |')
    note = (
        f'MiB of one step, {result["rows"]} rows of {result["tokens"]} tokens, by the '
        '`memory_analysis` of the program that JAX compiled; peak is arguments (weights and '
        'moments, given away to the outputs), new outputs and temporaries; in brackets, of full '
        f'fine-tuning. Compiled for {where(result)}, with the schedule that saves memory. A '
        'CPU multiplies narrower numbers as 32-bit copies. It also leaves gradients of weights for '
        'the end of a step, and keeps until then what they are computed from, so that remat '
        'saves full fine-tuning little there.'
    )
    return '\n'.join([*lines, '', note])


def benchmark(shapes: Sequence[str], rows: int, tokens: int) -> dict[str, Any]:
    """Return what is measured of every setting for these shapes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        found[shape] = []
        for setting in SETTINGS:
            found[shape].append(measure(backbone_config(shape), setting, rows, tokens))
            print(shape, setting, f'{found[shape][-1]["peak"] / 2**20:,.0f} MiB', flush=True)
    return {'rows': rows, 'tokens': tokens, 'shapes': found, **describe()}


def main(output: str, shapes: Sequence[str], rows: int, tokens: int) -> None:
    """Compile, write and print."""
    unknown = set(shapes) - set(SHAPES)
    if unknown:
        raise ValueError(f'--shapes has {", ".join(unknown)}; expected {", ".join(SHAPES)}')
    directory = files.make_directory(output)
    write(directory, 'memory', benchmark(shapes, rows, tokens), render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'shapes': flags.DEFINE_list('shapes', list(SHAPES), 'Shapes of backbones.'),
        'rows': flags.DEFINE_integer('rows', 32, 'Rows of a batch.', lower_bound=1),
        'tokens': flags.DEFINE_integer('tokens', 128, 'Tokens of a row.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
