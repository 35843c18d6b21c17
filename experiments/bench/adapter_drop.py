"""AdapterDrop: time and arithmetic against the number of dropped layers.

    python -m experiments.bench.adapter_drop --output=DIR [--backbone=minilm]
        [--methods=pfeiffer,double_seq_bn] [--rows=32] [--length=64] [--repeats=9]

Inference and one training step (dropout on, AdamW) on random texts of one length, as Rücklé et al.
2021 measure them (section 3.3, tables 3 and 5): what a layer less costs does not depend on what the
texts say. Writes DIR/adapter_drop.json and DIR/adapter_drop.md.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from adapters_jax import entry, files, sharding
from adapters_jax.adapters import registry
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import partition
from adapters_jax.tasks.classification import Classification
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer
from adapters_jax.training.provenance import describe
from adapters_jax.training.step import jit_train_step
from experiments.bench.timing import Ratio, Times, compare
from experiments.output import write

TASK = Classification(labels=('no', 'yes'))
MODES = {'inference': 'inference', 'training': 'training step'}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: what to call, and the arithmetic that XLA counts in it."""

    call: Callable[[], Any]
    flops: float


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Return rows of one text each, without padding."""
    rng = np.random.default_rng(0)
    shape, ones = (rows, length), np.ones((rows, 1), np.int32)
    return {
        'input_ids': rng.integers(1, vocabulary, shape).astype(np.int32),
        'token_type_ids': np.zeros(shape, np.int32),
        'positions': np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        'segments': np.ones(shape, np.int32),
        'starts': 0 * ones,
        'example_mask': ones > 0,
        'example_id': np.arange(rows, dtype=np.int32)[:, None],
        'label': rng.integers(0, 2, (rows, 1)).astype(np.int32),
    }


def inference(model: Model, params: dict, batch: dict) -> Program:
    """Compile the forward pass without dropout."""
    program = jax.jit(model.apply).lower(params, batch).compile()
    return Program(lambda: program(params, batch), program.cost_analysis()['flops'])


def training(model: Model, params: dict, batch: dict) -> Program:
    """Compile a training step; each call takes the next one."""
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    everywhere = sharding.replicated(sharding.make_mesh(1))
    trainable, frozen = partition(params, model.rules)
    state = [sharding.place(trainable, np.float32, everywhere)]
    state.append(jax.jit(optimizer.init, out_shardings=everywhere)(state[0]))
    step = jit_train_step(*state, model=model, task=TASK, optimizer=optimizer)
    rest = (sharding.place(frozen, np.float32, everywhere), batch, jax.random.key(1), np.int32(0))
    program = step.lower(*state, *rest).compile()

    def call() -> Any:
        *state[:], metrics = program(*state, *rest)
        return metrics

    return Program(call, program.cost_analysis()['flops'])


def measure(
    method: str, backbone: LoadedBackbone, rows: int, length: int, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Return, for inference and training, a dict for each number of dropped layers from 0."""
    config = backbone.config
    whole = Model(config, registry.create(method), HeadConfig(), len(TASK.labels))
    params = jax.device_put(whole.init(jax.random.key(0), backbone.params))
    batch = jax.device_put(random_batch(rows, length, config.vocabulary))
    found = {}
    for mode, compiled in (('inference', inference), ('training', training)):
        models = [dataclasses.replace(whole, dropped=n) for n in range(config.layers + 1)]
        programs = {str(n): compiled(model, params, batch) for n, model in enumerate(models)}
        times = compare({name: p.call for name, p in programs.items()}, repeats)
        found[mode] = [row(int(n), programs, times) for n in programs]
    return found


def row(dropped: int, programs: dict[str, Program], times: dict[str, Times]) -> dict[str, Any]:
    """Return one line of the results; ratios are over the program with no layer dropped."""
    name = str(dropped)
    return {
        'dropped': dropped,
        'milliseconds': 1000 * times[name].median,
        'ratio': dataclasses.asdict(times[name].over(times['0'])),
        'flops': programs[name].flops,
        'flops_ratio': programs[name].flops / programs['0'].flops,
    }


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    heads = [f'{title}: {x}' for title in MODES.values() for x in ('time', 'faster', 'FLOPs')]
    lines = [f'| method | dropped | {" | ".join(heads)} |', f'|---|---|{"---|" * len(heads)}']
    for method, modes in result['methods'].items():
        for lines_of_modes in zip(*(modes[mode] for mode in MODES), strict=True):
            cells = [cell for line in lines_of_modes for cell in _cells(line)]
            number = lines_of_modes[0]['dropped']
            lines.append(f'| `{method}` | {number} | {" | ".join(cells)} |')
    note = (
        f'Times and FLOPs as parts of those with no layer dropped; in brackets the middle half of '
        f'{result["repeats"]} rounds in turns. Backbone `{result["backbone"]}`, {result["rows"]} '
        f'texts of {result["length"]} tokens, on {result["hardware"]}.'
    )
    return '\n'.join([*lines, '', note])


def _cells(line: dict[str, Any]) -> tuple[str, str, str]:
    ratio = Ratio(**line['ratio'])
    return str(ratio), f'{100 * (1 / ratio.value - 1):.0f} %', f'{line["flops_ratio"]:.3f}'


def main(
    output: str, backbone: str, methods: Sequence[str], rows: int, length: int, repeats: int
) -> None:
    """Measure every method; write the numbers and the table."""
    directory = files.make_directory(output)
    loaded = load_backbone(backbone)
    result = {'backbone': backbone, 'rows': rows, 'length': length, 'repeats': repeats}
    result |= describe()
    result['methods'] = {
        method: measure(method, loaded, rows, length, repeats) for method in methods
    }
    write(directory, 'adapter_drop', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'backbone': flags.DEFINE_string('backbone', 'minilm', 'Backbone, as in a config.'),
        'methods': flags.DEFINE_list('methods', ['pfeiffer', 'double_seq_bn'], 'Which methods.'),
        'rows': flags.DEFINE_integer('rows', 32, 'Texts of a batch.', lower_bound=1),
        'length': flags.DEFINE_integer('length', 64, 'Tokens of a text.', lower_bound=1),
        'repeats': flags.DEFINE_integer('repeats', 9, 'Rounds of measurements.', lower_bound=1),
    }
    flags.mark_flag_as_required('output')
    return holders


if __name__ == '__main__':
    entry.run(_define, main)
