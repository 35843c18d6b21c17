"""What more devices cost: the overhead of a step here, and what would be sent on pods.

    python -m experiments.bench.scaling --output=DIR [--repeats=7] [--notiming] [--noprograms]

Two things, of which only the first is a time that was measured. (a) A step of the same total work
on meshes of 1 to 8 simulated CPU devices, in turns within one process, as a multiple of the step on
one device. Simulated devices share the machine's cores, so 1 would be ideal, and what exceeds it is
the overhead of cutting the work and of the collectives. (b) The bytes that each device sends in a
step, read from the program compiled for 8 devices, and from them and published figures an estimate
of a step on pods. Writes DIR/scaling.json and DIR/scaling.md.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from adapters_jax import compile as ahead_of_time
from adapters_jax import config as configs
from adapters_jax import entry, files, sharding
from adapters_jax.config import Config
from adapters_jax.training import ahead
from adapters_jax.training.placement import Placement, make_mesh
from adapters_jax.training.provenance import describe
from adapters_jax.training.state import prepare
from experiments.bench.timing import Ratio, compare
from experiments.output import where, write

DEVICES = 8
MESHES = {
    'one': (1, 1, 1),
    **{f'data {n}': (n, 1, 1) for n in (2, 4, 8)},
    **{f'fsdp {n}': (1, n, 1) for n in (2, 4, 8)},
    **{f'tensor {n}': (1, 1, n) for n in (2, 4)},
}
# The sizes of Devlin et al. 2019, section 3, and Turc et al. 2019 (small).
SIZES = {
    'BERT-small': {'hidden_size': 512, 'num_hidden_layers': 4, 'num_attention_heads': 8},
    'BERT-base': {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12},
    'BERT-large': {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16},
}
METHODS = {
    'houlsby': 'houlsby[size=64]',
    'pfeiffer': 'pfeiffer[reduction_factor=16]',
    'lora': 'lora[r=8]',
    'full': 'full',
}
LENGTH, ROWS = 128, 32  # of a batch on each device of a pod, and tokens of a row
CHIPS = (8, 64, 256)


@dataclasses.dataclass(frozen=True)
class Pod:
    """What an accelerator computes and sends, by its makers' figures.

    Attributes:
        flops: peak a second in bfloat16, dense.
        inside: bytes a second that a chip sends to those of its own group, in all directions.
        group: chips that are joined so.
        between: bytes a second that a chip sends to other groups.
        source: where the figures are published.
    """

    name: str
    flops: float
    inside: float
    group: int
    between: float
    source: str

    def seconds_to_send(self, bytes_: float, chips: int) -> float:
        """Return the time of an all-reduce in which each chip sends so many bytes.

        Of several groups, each sums among its own chips, and these then sum a part each with their
        like in the other groups; latency is left out.
        """
        beyond = bytes_ / self.group / self.between if chips > self.group else 0.0
        return bytes_ / self.inside + beyond


# v5e: 197 TFLOP/s; 400 GB/s bidirectional over the links of a chip in a 2D torus of 256, so 200
# GB/s each way; 6.4 Tbit/s out of the pod. H100 SXM: 989 TFLOP/s; NVLink 900 GB/s in both
# directions, 450 each way, to the 8 of a DGX, and out of it a 400 Gbit/s adapter for each GPU.
PODS = (
    Pod('TPU v5e', 197e12, 200e9, 256, 25e9 / 8, 'cloud.google.com/tpu/docs/v5e'),
    Pod('H100', 989e12, 450e9, 8, 50e9, 'NVIDIA H100 and DGX H100 data sheets'),
)
UTILISATION = 0.4  # of peak: what well-kept transformer training reaches (PaLM 46 %, GPT-3 21 %)


def sized(config: Config, size: str, method: str, folder: Path) -> Config:
    """Return the config with a backbone of a published size, of which there is only config.json."""
    hidden = SIZES[size]['hidden_size']
    directory = files.make_directory(folder / size)
    values = {
        'model_type': 'bert',
        'vocab_size': 30522,
        'intermediate_size': 4 * hidden,
        'max_position_embeddings': 512,
        'type_vocab_size': 2,
        'pad_token_id': 0,
        **SIZES[size],
    }
    files.write_json(directory / 'config.json', values)
    changed = configs.from_json(configs.to_json(config))
    changed.backbone, changed.method = str(directory), METHODS[method]
    changed.data.max_length = LENGTH
    changed.training.dropout = False  # draws numbers that no other device needs
    return changed


def on_mesh(config: Config, mesh: tuple[int, int, int], rows: int) -> Config:
    """Return the config with a mesh, and so many rows in a batch over all devices."""
    changed = configs.from_json(configs.to_json(config))
    changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor = mesh
    changed.training.batch_size = rows
    return changed


def make_step(config: Config) -> Callable[[], Any]:
    """Return a step over random weights and texts, which goes on from where the last one ended."""
    plan = ahead.plan(config)
    placement = Placement.of(config, make_mesh(config))
    rng = np.random.default_rng(0)

    def drawn(leaf: Any) -> np.ndarray:
        return np.float32(0.02) * rng.standard_normal(leaf.shape, np.float32)

    tree = jax.tree.map(drawn, plan.experiment.backbone.params)
    backbone = dataclasses.replace(plan.experiment.backbone, params=tree)
    experiment = dataclasses.replace(plan.experiment, backbone=backbone)
    start = prepare(experiment, experiment.init_params(), placement, total_steps=1000)
    batch = sharding.put_batch(random_batch(plan, rng), placement.mesh)
    state = [start.trainable, start.opt_state]

    def step() -> Any:
        *state[:], metrics = start.train_step(*state, start.frozen, batch, start.key, np.int32(0))
        return metrics

    return step


def random_batch(plan: ahead.Plan, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a batch whose every row is one text that fills it."""
    columns = {name: np.zeros(x.shape, x.dtype) for name, x in plan.batch.items()}
    shape = columns['input_ids'].shape
    columns['input_ids'] = rng.integers(1000, 30000, shape).astype(np.int32)
    columns['positions'] += np.arange(shape[1], dtype=np.int32)
    columns['segments'] += 1
    columns['example_mask'][:] = True
    return columns


def measure(
    config: Config, repeats: int, meshes: Mapping[str, tuple[int, int, int]]
) -> dict[str, Any]:
    """Return the times of a step on each mesh as multiples of that on one device."""
    rows = config.training.batch_size
    steps = {name: make_step(on_mesh(config, mesh, rows)) for name, mesh in meshes.items()}
    times = compare(steps, repeats)
    return {
        name: {
            'devices': math.prod(meshes[name]),
            'seconds': found.median,
            'ratio': dataclasses.asdict(found.over(times['one'])),
        }
        for name, found in times.items()
    }


def program(config: Config, mesh: tuple[int, int, int]) -> dict[str, Any]:
    """Return what a device holds, computes and sends in a step, compiled for a mesh."""
    changed = on_mesh(config, mesh, ROWS * mesh[0] * mesh[1])
    plan = ahead.plan(changed, jax.devices())
    shape = dict(plan.placement.mesh.shape)
    held = {name: sharding.bytes_per_device(tree) for name, tree in plan.held.items()}
    return {'held': held} | ahead.measure(ahead.trace_step(plan), shape, quick=True)


def estimate(found: Mapping[str, Any], pod: Pod, chips: int) -> dict[str, Any]:
    """Return the seconds that a step of data parallelism computes and sends on so many chips.

    What is sent was read for `DEVICES` chips; of an all-reduce each of n sends 2 (n - 1) / n.
    """
    sent = found['sent'] * ((chips - 1) / chips) / ((DEVICES - 1) / DEVICES)
    return {
        'pod': pod.name,
        'chips': chips,
        'compute': found['flops'] / (pod.flops * UTILISATION),
        'send': pod.seconds_to_send(sent, chips),
    }


def programs(config: Config, sizes: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return a row for each size and method: what is sent over each mesh, and estimates."""
    rows = []
    for size in sizes:
        for method in METHODS:
            changed = sized(config, size, method, folder)
            by = {
                'data': program(changed, (DEVICES, 1, 1)),
                'fsdp': program(changed, (1, DEVICES, 1)),
            }
            pods = [estimate(by['data'], pod, chips) for pod in PODS for chips in CHIPS]
            rows.append({'size': size, 'method': method, **by, 'estimates': pods})
            print(f'{size}, {method}: sends {by["data"]["sent"]:,.0f} bytes', flush=True)
    return rows


def render(result: dict[str, Any]) -> str:
    """Return the Markdown tables, and below them how they were found."""
    lines = _times(result) if result['steps'] else []
    if result['programs']:
        lines += ['', *_sent(result['programs']), '', *_pods(result['programs'])]
    return '\n'.join(lines)


def _times(result: Mapping[str, Any]) -> list[str]:
    """Return the table of what was measured."""
    lines = ['| mesh | devices | step, one device = 1 |', '|---|---|---|']
    for name, row in result['steps'].items():
        lines.append(f'| {name} | {row["devices"]} | {Ratio(**row["ratio"])} |')
    note = (
        f'The same {result["rows"]} rows of {LENGTH} tokens, `{result["timed"]["method"]}` on '
        f'{result["timed"]["size"]} without dropout, over devices simulated on '
        f'{where(result)} (all of which one device uses, too), so that 1 is ideal and '
        f'the rest is overhead; in brackets the middle half of {result["repeats"]} rounds in turns.'
    )
    return [*lines, '', note]


def _sent(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of what a device holds and sends."""
    lines = [
        '| backbone | method | trained | sent, data 8 | fsdp 8 | held, data 8 | fsdp 8 |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        held = [
            sum(row[mesh]['held'][name] for name in ('frozen', 'trainable', 'optimiser'))
            for mesh in ('data', 'fsdp')
        ]
        trained = row['data']['held']['trainable'] / 4
        numbers = [_mega(row[mesh]['sent']) for mesh in ('data', 'fsdp')] + [_mega(h) for h in held]
        cells = (row['size'], f'`{row["method"]}`', f'{trained:,.0f}', *numbers)
        lines.append(f'| {" | ".join(cells)} |')
    note = (
        f'MB that each of 8 devices sends in a step, with {ROWS} rows of {LENGTH} tokens on each, '
        'and MB of parameters and optimiser state that it holds; float32, without dropout, from '
        'the compiled program.'
    )
    return [*lines, '', note]


def _pods(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of estimates."""
    titles = [f'{e["pod"]}, {e["chips"]}' for e in rows[0]['estimates']]
    lines = [f'| backbone | method | {" | ".join(titles)} |', f'|---|---|{"---|" * len(titles)}']
    for row in rows:
        cells = [f'{1e3 * e["compute"]:.1f} + {1e3 * e["send"]:.2f}' for e in row['estimates']]
        lines.append(f'| {row["size"]} | `{row["method"]}` | {" | ".join(cells)} |')
    figures = '; '.join(
        f'{pod.name}: {pod.flops / 1e12:.0f} TFLOP/s, {pod.inside / 1e9:.0f} GB/s among '
        f'{pod.group}, {pod.between / 1e9:.0f} GB/s beyond ({pod.source})'
        for pod in PODS
    )
    note = (
        'An estimate, not a measurement: milliseconds to compute + to send, one after the other, '
        f"of a step in data parallelism with {ROWS} rows on each chip; the program's FLOPs at "
        f'{100 * UTILISATION:.0f} % of peak, its bytes within a group of chips and, divided by '
        f'the chips of a group, between groups. {figures}.'
    )
    return [*lines, '', note]


def _mega(size: float) -> str:
    return f'{size / 1e6:,.1f}'


def benchmark(config: Config, repeats: int, size: str, rows: int, folder: Path) -> dict[str, Any]:
    """Return the times of (a)."""
    method = 'pfeiffer'
    config = on_mesh(sized(config, size, method, folder), (1, 1, 1), rows)
    steps = measure(config, repeats, MESHES)
    timed = {'size': size, 'method': method}
    return {'rows': rows, 'repeats': repeats, 'timed': timed, 'steps': steps, **describe()}


def main(output: str, repeats: int, size: str, rows: int, timing: bool, programs_: bool) -> None:
    """Measure and compile, or take what is not asked for from an earlier run in the directory."""
    directory = files.make_directory(Path(output))
    ahead_of_time.simulate(DEVICES)
    config = configs.base()
    config.task.labels = ('no', 'yes')
    stored = directory / 'scaling.json'
    result = json.loads(stored.read_text()) if stored.exists() else {'programs': [], 'steps': {}}
    if timing:
        result |= benchmark(config, repeats, size, rows, directory)
    if programs_:
        result['programs'] = programs(config, ('BERT-base', 'BERT-large'), directory)
        result['compiled'] = describe()  # times may be of another commit and machine
    write(directory, 'scaling', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'repeats': flags.DEFINE_integer('repeats', 7, 'Rounds of the comparison of steps.'),
        'size': flags.DEFINE_enum('size', 'BERT-small', list(SIZES), 'Backbone that is timed.'),
        'rows': flags.DEFINE_integer('rows', 16, 'Rows of the batch that is timed.'),
        'timing': flags.DEFINE_bool('timing', True, 'Measure times.'),
        'programs_': flags.DEFINE_bool('programs', True, 'Compile for pods.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
