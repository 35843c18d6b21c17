"""How fast matrix products are: XLA as it comes, with our options (`adapters_jax.xla`), and torch.

    python -m experiments.bench.products --output=DIR [--rounds=15]

Products in float32 of the shapes that a batch of 32 x 128 tokens has in MiniLM and BERT-base, and a
training step and a forward pass of MiniLM with each kind of option. Writes DIR/products.json and
DIR/products.md.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from adapters_jax import entry, files, xla
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.training.provenance import describe
from experiments.bench import libraries, programs
from experiments.bench.timing import Ratio, compare
from experiments.output import write

SHAPES = ((4096, 384, 384), (4096, 384, 1536), (4096, 1536, 384), (4096, 768, 3072))
PAUSE = 0.05


def product_calls(shape: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """Return the product of two random matrices, done by each."""
    import torch

    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    left = rng.standard_normal((rows, inner), np.float32)
    right = rng.standard_normal((inner, columns), np.float32)
    found: dict[str, Callable[[], Any]] = {}
    for name, options in (('default', {}), ('ours', xla.options())):
        given = jnp.asarray(left), jnp.asarray(right)
        program = jax.jit(jnp.matmul, compiler_options=options).lower(*given).compile()
        found[name] = lambda program=program, given=given: program(*given)
    tensors = torch.from_numpy(left), torch.from_numpy(right)
    return found | {'torch': lambda: torch.matmul(*tensors)}


@contextlib.contextmanager
def _as_xla_comes() -> Iterator[None]:
    with mock.patch.object(xla, 'options', lambda *_, **__: {}):
        yield


def both(mode: str) -> dict[str, programs.Program]:
    """Return a training step, or a forward pass, with each kind of option."""
    loaded = load_backbone('minilm')
    batch = programs.random_batch(32, 128, loaded.config.vocabulary)
    made = programs.make(loaded, 'double_seq_bn[size=24]')
    ours = getattr(programs, mode)(*made, batch)
    with _as_xla_comes():
        default = getattr(programs, mode)(*made, batch)
    return {'default': default, 'ours': ours}


def measure(rounds: int) -> dict[str, Any]:
    """Return rates of products in GFLOP/s, and the ratios of programs' times."""
    libraries.prepare()
    products = []
    for shape in SHAPES:
        times = compare(product_calls(shape), rounds, pause=PAUSE)
        work = 2 * np.prod(shape, dtype=float) / 1e9
        rates = {name: work / one.median for name, one in times.items()}
        products.append({'shape': shape, 'gflops': rates})
    whole = {}
    for mode in ('inference', 'training'):
        made = both(mode)
        calls = {name: program.call for name, program in made.items()}
        times = compare(calls, max(3, rounds // 3), pause=PAUSE)
        ratio = times['default'].over(times['ours'])
        temporary = {name: program.temporary for name, program in made.items()}
        whole[mode] = {'ratio': ratio.value, 'spread': [ratio.low, ratio.high]}
        whole[mode]['temporary'] = temporary
    return {'products': products, 'programs': whole}


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    lines = ['| product | XLA as it comes | with our options | torch |', '|---|---|---|---|']
    for row in result['products']:
        rates = (f'{row["gflops"][name]:.0f}' for name in ('default', 'ours', 'torch'))
        lines.append(f'| {" x ".join(map(str, row["shape"]))} | {" | ".join(rates)} |')
    ratios = (
        f'{mode} {Ratio(found["ratio"], *found["spread"])}'
        for mode, found in result['programs'].items()
    )
    less = result['programs']['training']['temporary']
    note = (
        f'GFLOP/s in float32, medians of {result["rounds"]} rounds in turns, on '
        f'{result["hardware"]}. Time of MiniLM on 32 x 128 tokens as XLA comes over that with our '
        f'options: {", ".join(ratios)}; temporaries of the training step: '
        f'{less["default"] / 2**20:,.0f} MiB, {less["ours"] / 2**20:,.0f} MiB with our options.'
    )
    return '\n'.join([*lines, '', note])


def main(output: str, rounds: int) -> None:
    """Measure; write the numbers and the table."""
    directory = files.make_directory(output)
    write(directory, 'products', measure(rounds) | {'rounds': rounds} | describe(), render)


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'rounds': flags.DEFINE_integer('rounds', 15, 'Rounds of the comparison.', lower_bound=1),
    }
    flags.mark_flag_as_required('output')
    return holders


if __name__ == '__main__':
    entry.run(_define, main)
