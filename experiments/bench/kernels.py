"""What an accelerator spends a step on, by kernel: a profile as text.

    python -m experiments.bench.kernels --output=DIR [--backbone=base] [--method=lora[r=8]]
        [--rows=64] [--tokens=128] [--mode=training] [--calls=5]

The profile of JAX, summed over kernels of one name; what XLA calls a kernel is the instruction of
the compiled program, which lies beside it. Writes DIR/kernels.txt and DIR/program.txt. It needs a
GPU: XLA's programs for a CPU do not say what runs in them.
"""

import collections
import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from adapters_jax import entry, files
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.training.provenance import hardware
from experiments.bench import backbones, programs

Kernels = list[tuple[str, int, float]]  # name, launches, microseconds


def by_name(events: Iterable[Mapping[str, Any]]) -> Kernels:
    """Return the kernels of a trace (in Chrome's format), those that took most time first."""
    events = list(events)
    named = [e for e in events if e.get('ph') == 'M' and e['name'] == 'thread_name']
    streams = {(e['pid'], e['tid']) for e in named if 'Stream' in e['args']['name']}
    launches: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get('ph') == 'X' and (event['pid'], event['tid']) in streams:
            launches[event['name']] += 1
            times[event['name']] += event['dur']
    return [(name, launches[name], time) for name, time in times.most_common()]


def trace(call: Callable[[], Any], calls: int) -> list[dict[str, Any]]:
    """Return the events of so many calls."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(calls):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob('perfetto_trace.json.gz')
        return json.loads(gzip.decompress(path.read_bytes()))['traceEvents']


def render(kernels: Kernels, calls: int, title: str) -> str:
    """Return the lines: of one call the microseconds, the launches and the name."""
    whole = sum(time for _, _, time in kernels) / calls
    lines = [title, f'{whole:,.0f} us of kernels a call', '']
    lines += [f'{time / calls:10.1f} us {n / calls:6.1f} x  {name}' for name, n, time in kernels]
    return '\n'.join(lines) + '\n'


def main(
    output: str, backbone: str, method: str, rows: int, tokens: int, mode: str, calls: int
) -> None:
    """Compile, warm up, trace and write.

    Raises:
        ValueError: JAX computes on a CPU.
    """
    if jax.default_backend() == 'cpu':
        raise ValueError('JAX computes on a CPU, whose programs do not tell their kernels')
    directory = files.make_directory(output)
    loaded = load_backbone(str(backbones.folder(backbone, directory)))
    batch = programs.random_batch(rows, tokens, loaded.config.vocabulary)
    program = getattr(programs, mode)(*programs.make(loaded, method, 'bfloat16'), batch)
    jax.block_until_ready(program.call())
    title = f'{mode}: {method} on {backbone}, {rows} x {tokens}, bfloat16, {hardware()}'
    text = render(by_name(trace(program.call, calls)), calls, title)
    files.write_text(directory / 'kernels.txt', text)
    files.write_text(directory / 'program.txt', program.text)
    print(text)


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'backbone': flags.DEFINE_enum('backbone', 'base', backbones.NAMES, 'Whose shapes.'),
        'method': flags.DEFINE_string('method', 'lora[r=8]', 'What is trained.'),
        'rows': flags.DEFINE_integer('rows', 64, 'Rows of the batch.', lower_bound=1),
        'tokens': flags.DEFINE_integer('tokens', 128, 'Tokens of a row.', lower_bound=1),
        'mode': flags.DEFINE_enum('mode', 'training', ['training', 'inference'], 'Which program.'),
        'calls': flags.DEFINE_integer('calls', 5, 'Calls that are traced.', lower_bound=1),
    }
    flags.mark_flag_as_required('output')
    return holders


if __name__ == '__main__':
    entry.run(_define, main)
