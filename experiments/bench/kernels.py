"""What a device spends a step on, by kernel: a profile as text.

    python -m experiments.bench.kernels --output=DIR [--backbone=base] [--method=lora[r=8]]
        [--rows=64] [--tokens=128] [--dtype=bfloat16] [--mode=training] [--calls=5]

The profile of JAX, summed over kernels of one name. On a GPU that is XLA's name of an instruction
of the compiled program, which lies beside it; on a CPU it tells what the instruction is, the shape
it writes and the place in the model it comes from, all layers in one. Writes DIR/kernels.txt and
DIR/program.txt.
"""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from adapters_jax import entry, files
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.training.dtypes import DTYPES
from adapters_jax.training.provenance import hardware
from experiments.bench import backbones, programs

Kernels = list[tuple[str, int, float]]  # name, launches, microseconds


# An instruction of a compiled program: its name, the first shape it writes, where it comes from.
_INSTRUCTION = re.compile(
    r'^ *(?:ROOT )?%(?P<name>\S+) = \(?(?P<shape>\w+\[[\d,]*\])'
    r'(?:.*metadata=\{op_name="(?P<place>[^"]*)")?',
    re.MULTILINE,
)
# What a place's path has that says nothing: the program's own name, methods of modules.
_FRAMES = re.compile(r'jit\(\w+\)/|\w+\._\w+/')


def of_streams(events: Iterable[Mapping[str, Any]]) -> Kernels:
    """Return the kernels of an accelerator's trace (in Chrome's format), the longest first."""
    events = list(events)
    named = [e for e in events if e.get('ph') == 'M' and e['name'] == 'thread_name']
    streams = {(e['pid'], e['tid']) for e in named if 'Stream' in e['args']['name']}
    ran = (e for e in events if e.get('ph') == 'X' and (e['pid'], e['tid']) in streams)
    return _summed((event['name'], event['dur']) for event in ran)


def of_instructions(events: Iterable[Mapping[str, Any]], program: str) -> Kernels:
    """Return the instructions of a CPU's trace, named by what the program's text says of them."""
    told = {found['name']: _described(found) for found in _INSTRUCTION.finditer(program)}
    ran = (e for e in events if e.get('ph') == 'X' and e.get('args', {}).get('hlo_op') in told)
    return _summed((told[event['args']['hlo_op']], event['dur']) for event in ran)


def _described(instruction: re.Match[str]) -> str:
    """Return what it is, what it writes, and its place, as all layers have it."""
    place = _FRAMES.sub('', instruction['place'] or '')
    place = re.sub(r'layer_\d+', 'layer', place)
    place = re.sub(r'^transpose\(jvp\(\w*\)\)', 'backward', place)
    place = re.sub(r'^jvp\(\w*\)', 'forward', place)
    kind = re.sub(r'[.\d]+$', '', instruction['name'])
    return f'{kind} {instruction["shape"]}  {place}'.rstrip()


def _summed(events: Iterable[tuple[str, float]]) -> Kernels:
    launches: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for name, time in events:
        launches[name] += 1
        times[name] += time
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
    output: str,
    backbone: str,
    method: str,
    rows: int,
    tokens: int,
    dtype: str,
    mode: str,
    calls: int,
) -> None:
    """Compile, warm up, trace and write."""
    directory = files.make_directory(output)
    loaded = load_backbone(str(backbones.folder(backbone, directory)))
    batch = programs.random_batch(rows, tokens, loaded.config.vocabulary)
    program = getattr(programs, mode)(*programs.make(loaded, method, dtype), batch)
    jax.block_until_ready(program.call())
    events = trace(program.call, calls)
    on_cpu = jax.default_backend() == 'cpu'
    kernels = of_instructions(events, program.text) if on_cpu else of_streams(events)
    title = f'{mode}: {method} on {backbone}, {rows} x {tokens}, {dtype}, {hardware()}'
    text = render(kernels, calls, title)
    files.write_text(directory / 'kernels.txt', text)
    files.write_text(directory / 'program.txt', program.text)
    print(text)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'backbone': flags.DEFINE_enum('backbone', 'base', backbones.NAMES, 'Whose shapes.'),
        'method': flags.DEFINE_string('method', 'lora[r=8]', 'What is trained.'),
        'rows': flags.DEFINE_integer('rows', 64, 'Rows of the batch.', lower_bound=1),
        'tokens': flags.DEFINE_integer('tokens', 128, 'Tokens of a row.', lower_bound=1),
        'dtype': flags.DEFINE_enum('dtype', 'bfloat16', DTYPES, 'Number format of activations.'),
        'mode': flags.DEFINE_enum('mode', 'training', ['training', 'inference'], 'Which program.'),
        'calls': flags.DEFINE_integer('calls', 5, 'Calls that are traced.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
