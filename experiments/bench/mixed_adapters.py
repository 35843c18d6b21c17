"""A batch whose rows use sixteen adapters, against the same batch with one.

    python -m experiments.bench.mixed_adapters --output=DIR [--lengths=32,128] [--repeats=7]

64 rows over 16 adapters, each row's drawn at random, on MiniLM: bottlenecks of size 48 (Pfeiffer's
place and both places) and LoRA of rank 8; inference and a training step. Beside it the same rows in
`peft` (`adapter_names=`) and in `adapters` (`BatchSplit`, which needs the rows sorted by adapter).
Writes `mixed_adapters.json` and `mixed_adapters.md`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from adapters_jax import entry, files, xla
from adapters_jax.adapters import registry
from adapters_jax.adapters.bank import Bank
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadBank, HeadConfig
from adapters_jax.params import Tree
from adapters_jax.training import provenance
from experiments.bench import libraries, timing
from experiments.bench.race import Race
from experiments.bench.steps import PAUSE
from experiments.output import where, write

ROWS, ADAPTERS, CLASSES = 64, 16, 4
METHODS = {
    'pfeiffer 48': 'pfeiffer[size=48]',
    'both places 48': 'double_seq_bn[size=48]',
    'lora 8': 'lora[r=8]',
}
NAMES = [f'a{i}' for i in range(ADAPTERS)]


def batch(length: int) -> dict[str, np.ndarray]:
    """Return 64 rows of one text each, without padding."""
    rng = np.random.default_rng(0)
    return {
        'input_ids': rng.integers(1000, 20000, (ROWS, length)).astype(np.int32),
        'token_type_ids': np.zeros((ROWS, length), np.int32),
        'positions': np.tile(np.arange(length, dtype=np.int32), (ROWS, 1)),
        'segments': np.ones((ROWS, length), np.int32),
        'starts': np.zeros((ROWS, 1), np.int32),
    }


def chosen() -> np.ndarray:
    """Return each row's adapter: four rows for each of sixteen, in random order."""
    numbers = np.repeat(np.arange(ADAPTERS, dtype=np.int32), ROWS // ADAPTERS)
    return np.random.default_rng(1).permutation(numbers)


def ours(loaded: LoadedBackbone, text: str, length: int) -> dict[str, Callable[[], Any]]:
    """Return forward passes and gradients of one adapter, of sixteen, and of sixteen in blocks."""
    single = Model(loaded.config, registry.create(text), HeadConfig(dropout=0.0), CLASSES)
    members = dict.fromkeys(NAMES, single.method)
    heads = HeadBank(tuple((name, single.head_config, CLASSES) for name in NAMES))
    many = Model(loaded.config, Bank(members=members), HeadConfig(), 1, heads=heads)
    backbone = jax.device_put(loaded.params)
    trees = {'one': single.init(jax.random.key(0), backbone)}
    trees['mixed'] = many.init(jax.random.key(0), backbone)
    trees['blocks'] = trees['mixed']
    stacked = {'adapters': {many.name: many.method.stack(trees['mixed']['adapters'][many.name])}}
    columns = {'one': {}, 'mixed': {'adapter': chosen()}, 'blocks': {'adapter': np.arange(16)}}
    found: dict[str, Callable[[], Any]] = {}
    for name, tree in trees.items():
        model = single if name == 'one' else many
        given = batch(length) | columns[name]
        frozen = {'backbone': backbone}
        own = {key: tree[key] for key in ('adapters', 'heads')}
        serving = own if name == 'one' else own | stacked
        found[f'{name} forward'] = _forward(model, serving, frozen, given)
        found[f'{name} gradient'] = _gradient(model, own, frozen, given)
    return found


def _forward(model: Model, own: Tree, frozen: Tree, given: Any) -> Callable[[], Any]:
    run = jax.jit(
        lambda own, frozen, given: model.apply(own | frozen, given), compiler_options=xla.options()
    )
    given = jax.device_put(given)
    return lambda: run(own, frozen, given)


def _gradient(model: Model, own: Tree, frozen: Tree, given: Any) -> Callable[[], Any]:
    def loss(own: Tree, frozen: Tree, given: Any) -> Any:
        return jnp.square(model.apply(own | frozen, given)).mean()

    run = jax.jit(jax.grad(loss), compiler_options=xla.options(lean=True))
    given = jax.device_put(given)
    return lambda: run(own, frozen, given)


def theirs(directory: Path, text: str, length: int) -> dict[str, Callable[[], Any]]:
    """Return forward passes of the library that has the method, with one adapter and sixteen."""
    import torch

    device = libraries.prepare()
    ids = torch.tensor(batch(length)['input_ids'].astype(np.int64), device=device)
    return _peft(directory, ids) if text.startswith('lora') else _adapters(directory, text, ids)


def _peft(directory: Path, ids: Any) -> dict[str, Callable[[], Any]]:
    import peft
    import torch
    import transformers

    model = transformers.BertModel.from_pretrained(directory)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=['query', 'value'])
    model = peft.get_peft_model(model, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.to(ids.device).eval()
    rows = [NAMES[number] for number in chosen()]

    def run(**options: Any) -> Any:
        with torch.no_grad():
            return model(ids, **options)[0].sum().item()

    return {'peft one': run, 'peft mixed': lambda: run(adapter_names=rows)}


def _adapters(directory: Path, text: str, ids: Any) -> dict[str, Callable[[], Any]]:
    import adapters
    import torch
    from adapters.composition import BatchSplit

    kind = adapters.SeqBnConfig if text.startswith('pfeiffer') else adapters.DoubleSeqBnConfig
    model = adapters.AutoAdapterModel.from_pretrained(directory)
    for name in NAMES:
        model.add_adapter(name, config=kind(reduction_factor=8))
    split = BatchSplit(*NAMES, batch_sizes=[ROWS // ADAPTERS] * ADAPTERS)
    model.to(ids.device).eval()

    def run(setup: Any) -> Any:
        model.set_active_adapters(setup)
        with torch.no_grad():
            return model.bert(ids)[0].sum().item()

    return {'adapters one': lambda: run(NAMES[0]), 'adapters mixed': lambda: run(split)}


def measure(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each method and length: ratios of sixteen adapters to one."""
    logging.getLogger('adapters').setLevel(logging.ERROR)
    loaded, rows = load_backbone('minilm'), []
    for length in lengths:
        for name, text in METHODS.items():
            own = ours(loaded, text, length)
            # What is compared is called one right after the other, and nothing of torch among
            # them, whose threads go on turning for a while after a call.
            times: dict[str, timing.Times] = {}
            for kind in ('forward', 'gradient'):
                named = {name: run for name, run in own.items() if name.endswith(kind)}
                times |= timing.compare(named, repeats=repeats)
            beside = theirs(loaded.directory, text, length) | {'ours': own['mixed forward']}
            times |= timing.compare(beside, repeats, pause=PAUSE)
            row: dict[str, Any] = {'method': name, 'length': length}
            library = 'peft' if text.startswith('lora') else 'adapters'
            pairs = {
                'forward': ('mixed forward', 'one forward'),
                'forward, blocks of 4': ('blocks forward', 'one forward'),
                'gradient': ('mixed gradient', 'one gradient'),
                'gradient, blocks of 4': ('blocks gradient', 'one gradient'),
                library: (f'{library} mixed', f'{library} one'),
                f'{library} mixed / ours mixed': (f'{library} mixed', 'ours'),
            }
            for title, (over, under) in pairs.items():
                ratio = times[over].over(times[under])
                row[title] = {'ratio': ratio.value, 'low': ratio.low, 'high': ratio.high}
            row['seconds'] = {key: value.median for key, value in times.items()}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def races(repeats: int) -> Iterator[Race]:
    """Race forward passes of sixteen adapters in one batch, for `python -m experiments.bench`."""
    loaded = load_backbone('minilm')
    for name, text in METHODS.items():
        library = 'peft' if text.startswith('lora') else 'adapters'
        calls = {
            'ours': ours(loaded, text, 32)['mixed forward'],
            'theirs': theirs(loaded.directory, text, 32)[f'{library} mixed'],
        }
        times = timing.compare(calls, repeats, pause=PAUSE)
        settings = {'backbone': 'minilm', 'method': text, 'rows': ROWS, 'adapters': ADAPTERS}
        settings |= {'tokens': 32, 'dtype': 'float32'}  # what both sides make of a checkpoint
        yield Race(f'{name}, {library}', times['ours'], times['theirs'], settings)


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    columns = ['forward', 'forward, blocks of 4', 'gradient', 'gradient, blocks of 4']
    lines = [
        f'| method | tokens a row | {" | ".join(columns)} | the library | its mixed / ours |',
        '|---' * (len(columns) + 4) + '|',
    ]
    for row in result['rows']:
        library = 'peft' if 'peft' in row else 'adapters'
        shown = [str(timing.Ratio(*row[c].values())) for c in columns]
        shown.append(f'{library} {timing.Ratio(*row[library].values())}')
        shown.append(str(timing.Ratio(*row[f'{library} mixed / ours mixed'].values())))
        lines.append(f'| {row["method"]} | {row["length"]} | {" | ".join(shown)} |')
    note = (
        f'Times of 64 rows over {len(NAMES)} adapters relative to those with one; in brackets the '
        f'middle half of {result["repeats"]} rounds in turns. The last two columns are forward '
        f'passes. Backbone `minilm`, on {where(result)}. Made by `{_command(result)}`. The '
        'race of this name among those against the libraries measures it once more, on its own.'
    )
    return '\n'.join([*lines, '', note])


def _command(result: dict[str, Any]) -> str:
    lengths = ','.join(dict.fromkeys(str(row['length']) for row in result['rows']))
    options = f'--lengths={lengths} --repeats={result["repeats"]}'
    return f'python -m experiments.bench.mixed_adapters --output=DIR {options}'


def main(output: str, lengths: Sequence[str], repeats: int) -> None:
    """Measure, and write the figures.

    Raises:
        ValueError: a length that is no number of tokens.
    """
    if wrong := [given for given in lengths if not given.isdecimal() or int(given) < 1]:
        raise ValueError(f'--lengths has {wrong[0]!r}; expected numbers of tokens, such as 32,128')
    directory = files.make_directory(output)
    rows = measure([int(given) for given in lengths], repeats)
    result = {'rows': rows, 'repeats': repeats} | provenance.describe()
    write(directory, 'mixed_adapters', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory to write to.'),
        'lengths': flags.DEFINE_list('lengths', ['32', '128'], 'Tokens of a row.'),
        'repeats': flags.DEFINE_integer('repeats', 7, 'Rounds.', lower_bound=1),
    }


if __name__ == '__main__':
    # The public libraries stand on torch, which our commands keep transformers from importing.
    os.environ['USE_TORCH'] = '1'
    entry.run(_define, main)
