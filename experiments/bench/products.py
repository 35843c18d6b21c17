"""How fast matrix products are: XLA as it comes, as we have it compute them, and torch.

    python -m experiments.bench.products --output=DIR [--rounds=15]

Products in float32 of the shapes that a batch of 32 x 128 tokens has in MiniLM and BERT-base, and a
training step and a forward pass of MiniLM, with our options (`adapters_jax.xla`) and without;
gradients for the input of a product where rows are few (`adapters_jax.products`), by themselves and
one after another as in a pass backwards; and how many cores work on the products of attention.
Writes DIR/products.json and DIR/products.md.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from adapters_jax import entry, files, products, xla
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.training.provenance import describe
from experiments.bench import libraries, programs
from experiments.bench.timing import Ratio, compare
from experiments.output import where, write

SHAPES = ((4096, 384, 384), (4096, 384, 1536), (4096, 1536, 384), (4096, 768, 3072))
# Rows, and the kernel: a batch of TREC in MiniLM; small batches in BERT-base and BERT-large.
FEW = (
    *((440, 384, 1536), (440, 1536, 384)),
    *((1024, 768, 3072), (1024, 3072, 768)),
    *((512, 1024, 4096), (512, 4096, 1024), (128, 4096, 1024)),
)
# Rows, hidden and inner size: the feed-forward networks that these kernels are of.
PASSES = ((440, 384, 1536), (1024, 768, 3072), (512, 1024, 4096), (128, 1024, 4096))
LAYERS = 6
# A part of that batch: 8 texts of 128 tokens, in 12 heads of 32 numbers.
HEADS = (8, 12, 128, 32)
PAUSE = 0.05
WATCHED = 2.0  # seconds in which the cores at work are counted


Calls = dict[str, Callable[[], Any]]


def product_calls(shape: tuple[int, int, int]) -> Calls:
    """Return the product of two random matrices, done by each."""
    rows, inner, columns = shape
    left, right = _random((rows, inner), (inner, columns))
    return {
        'default': _compiled(jnp.matmul, {}, left, right),
        'ours': _compiled(jnp.matmul, xla.options(), left, right),
        'torch': _by_torch(lambda left, right: left @ right, left, right),
    }


def gradient_calls(shape: tuple[int, int, int]) -> Calls:
    """Return the gradient for the input of a product with a kernel, done by each."""
    rows, inputs, outputs = shape
    given = _random((rows, outputs), (inputs, outputs))
    options = xla.options(lean=True)
    return {
        'default': _compiled(lambda gradient, kernel: gradient @ kernel.T, options, *given),
        'ours': _compiled(products.input_gradient, options, *given),
        'torch': _by_torch(lambda gradient, kernel: gradient @ kernel.T, *given),
    }


def pass_calls(shape: tuple[int, int, int]) -> Calls:
    """Return the products of a pass backwards through feed-forward networks, done by each."""
    rows, hidden, inner = shape
    given = _random((rows, hidden), *[(hidden, inner), (inner, hidden)] * LAYERS)
    options = xla.options(lean=True)
    return {
        'default': _compiled(_backwards(lambda x, kernel: x @ kernel.T, jnp.tanh), options, *given),
        'ours': _compiled(_backwards(products.input_gradient, jnp.tanh), options, *given),
        'torch': _by_torch(_backwards(lambda x, kernel: x @ kernel.T, lambda x: x.tanh()), *given),
    }


def _backwards(gradient: Callable[..., Any], between: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, *kernels: Any) -> Any:
        for kernel in reversed(kernels):
            x = between(gradient(x, kernel))
        return x

    return run


def attention_calls() -> Calls:
    """Return the products of queries and keys in all heads, done by each."""
    given = _random(HEADS, HEADS)
    scores = functools.partial(jnp.einsum, 'BHTK,BHSK->BHTS')
    return {
        'default': _compiled(scores, {}, *given),
        'ours': _compiled(scores, xla.options(), *given),
        'torch': _by_torch(lambda query, key: query @ key.mT, *given),
    }


def cores_at_work(call: Callable[[], Any], seconds: float = WATCHED) -> float:
    """Return the seconds of a processor that this process takes in a second of these calls."""
    jax.block_until_ready(call())
    begin, worked = time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - begin) < seconds:
        jax.block_until_ready(call())
    return (time.process_time() - worked) / passed


def _random(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _compiled(
    function: Callable[..., Any], options: xla.Options, *given: np.ndarray
) -> Callable[[], Any]:
    placed = [jnp.asarray(array) for array in given]
    program = jax.jit(function, compiler_options=options).lower(*placed).compile()
    return lambda: program(*placed)


def _by_torch(function: Callable[..., Any], *given: np.ndarray) -> Callable[[], Any]:
    import torch

    tensors = [torch.from_numpy(array) for array in given]
    return lambda: function(*tensors)


@contextlib.contextmanager
def _as_xla_comes() -> Iterator[None]:
    with mock.patch.object(xla, 'options', lambda *_, **__: {}):
        yield


def both(mode: str) -> dict[str, programs.Program]:
    """Return a training step, or a forward pass, with each kind of option."""
    loaded = load_backbone('minilm')
    batch = programs.random_batch(32, 128, loaded.config.vocabulary)
    made = programs.make(loaded, 'double_seq_bn[size=24]')
    ours = getattr(programs, mode)(*made, batch, parts=1)
    with _as_xla_comes():
        default = getattr(programs, mode)(*made, batch, parts=1)
    return {'default': default, 'ours': ours}


def measure(rounds: int) -> dict[str, Any]:
    """Return rates of products in GFLOP/s, and the ratios of programs' times."""
    libraries.prepare()
    rated = [_rates(product_calls(shape), shape, rounds) for shape in SHAPES]
    gradients = [_rates(gradient_calls(shape), shape, rounds) for shape in FEW]
    whole = {}
    for mode in ('inference', 'training'):
        made = both(mode)
        calls = {name: program.call for name, program in made.items()}
        times = compare(calls, _rounds_of_programs(rounds), pause=PAUSE)
        ratio = times['default'].over(times['ours'])
        temporary = {name: program.temporary for name, program in made.items()}
        whole[mode] = {'ratio': ratio.value, 'spread': [ratio.low, ratio.high]}
        whole[mode]['temporary'] = temporary
    times = 2 * LAYERS  # up and down
    passes = [_rates(pass_calls(shape), shape, rounds, times) for shape in PASSES]
    attention = _rates(attention_calls(), (*HEADS, HEADS[2]), rounds)
    attention['cores'] = {name: cores_at_work(call) for name, call in attention_calls().items()}
    measured = {'products': rated, 'gradients': gradients, 'attention': attention}
    measured |= {'passes': passes}
    return measured | {'programs': whole}


def _rounds_of_programs(rounds: int) -> int:
    """Return how many rounds whole programs run, which take longer than products do."""
    return max(3, rounds // 3)


def _rates(
    calls: Calls, shape: tuple[int, ...], rounds: int, products_each: int = 1
) -> dict[str, Any]:
    times = compare(calls, rounds, pause=PAUSE)
    work = 2 * products_each * np.prod(shape, dtype=float) / 1e9
    return {'shape': shape, 'gflops': {name: work / one.median for name, one in times.items()}}


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    lines = ['| product | XLA as it comes | with our options | torch |', '|---|---|---|---|']
    lines += map(_row, result['products'])
    lines += [
        '',
        '| gradient, rows x kernel | differentiated | ours | torch |',
        '|---|---|---|---|',
    ]
    lines += map(_row, result['gradients'])
    lines += [
        '',
        f'| a pass of {LAYERS} layers, rows x hidden x inner | differentiated | ours | torch |',
    ]
    lines += ['|---|---|---|---|', *map(_row, result['passes'])]
    lines += ['', '| texts x heads x product | XLA as it comes | with our options | torch |']
    lines += ['|---|---|---|---|', _row(result['attention'])]
    cores = result['attention']['cores']
    ratios = (
        f'{mode} {Ratio(found["ratio"], *found["spread"])}'
        for mode, found in result['programs'].items()
    )
    less = result['programs']['training']['temporary']
    note = (
        f'GFLOP/s in float32, medians of {result["rounds"]} rounds in turns, on '
        f'{where(result)}. Products by themselves are called one at a time, for each of which '
        'threads wake; in a pass they follow one another, as in training. On the last one work '
        f'{cores["ours"]:.1f} cores with our options, {cores["torch"]:.1f} in torch. Time of '
        'MiniLM on 32 x 128 tokens as XLA comes over that with our options: '
        f'{", ".join(ratios)}, of {_rounds_of_programs(result["rounds"])} rounds; '
        'temporaries of the training step: '
        f'{less["default"] / 2**20:,.0f} MiB, {less["ours"] / 2**20:,.0f} MiB with our options.'
    )
    return '\n'.join([*lines, '', note])


def _row(row: dict[str, Any]) -> str:
    rates = (f'{row["gflops"][name]:.0f}' for name in ('default', 'ours', 'torch'))
    return f'| {" x ".join(map(str, row["shape"]))} | {" | ".join(rates)} |'


def main(output: str, rounds: int) -> None:
    """Measure; write the numbers and the table."""
    directory = files.make_directory(output)
    write(directory, 'products', measure(rounds) | {'rounds': rounds} | describe(), render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'rounds': flags.DEFINE_integer('rounds', 15, 'Rounds of the comparison.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
