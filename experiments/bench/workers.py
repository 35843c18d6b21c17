"""Jobs of a benchmark that need a process of their own: `python -m experiments.bench.workers JSON`.

The last line that a job prints is what it found, as JSON. Each is done by 'ours' and by 'theirs'
(`adapters`): an epoch of training as a user would run it, a sweep, a first step, peak memory.
"""

import importlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax import allocator

Found = dict[str, Any]
IMPORTS = {'ours': 'adapters_jax.train', 'theirs': 'adapters'}  # what training needs


def epoch(side: str, **course: Any) -> Found:
    """Train for one epoch over the texts of a JSONL file, as each side's own pipeline has it.

    Importing and tokenizing are not counted. Nor are, of ours, compiling and the first two steps,
    and what prepares them: theirs is all of `trainer.train()`, which compiles nothing, but makes
    its loader, optimizer and schedule.
    """
    return _our_epoch(_config(**course)) if side == 'ours' else _their_epoch(course)


def sweep(side: str, members: int, **course: Any) -> Found:
    """Train a population for one epoch; theirs is one run, of which a sweep takes so many."""
    if side == 'ours':
        return _our_sweep(_config(**course), members)
    found = _their_epoch(course)
    return found | {'seconds': members * found['seconds']}


def _config(
    backbone: str,
    data: str,
    size: int,
    batch_size: int,
    dtype: str,
    left_out: Sequence[int] = (),
    **_: Any,
) -> Any:
    from configs import text_classification
    from experiments.bench import programs

    method = f'double_seq_bn[size={size},leave_out={list(left_out)}]'
    config = text_classification.get_config(f'method={method},backbone={backbone}')
    config.data.train = config.data.validation = config.data.test = data
    config.head.pooling, config.head.layers = programs.HEAD.pooling, programs.HEAD.layers
    config.training.batch_size, config.training.dtype = batch_size, dtype
    config.training.epochs, config.training.patience = 4.0, 0
    return config


def _our_epoch(config: Any) -> Found:
    from adapters_jax.training import experiment
    from adapters_jax.training.loop import Trainer

    run = Trainer(experiment.build(config), Path())
    return _timed(run)


def _our_sweep(config: Any, members: int) -> Found:
    import dataclasses

    from adapters_jax.training import experiment, grid
    from adapters_jax.training.population_run import PopulationRun

    rates = [1e-4 * 3**i for i in range(4)]
    seeds = range(members // len(rates))
    config.sweep.grid = (
        f'optimizer.learning_rate={",".join(map(str, rates))}',
        f'seed={",".join(map(str, seeds))}',
    )
    config.data.seed = 0
    built, everyone = experiment.build(config), grid.expand(config)
    first = dataclasses.replace(built, config=everyone[0].config)
    run = PopulationRun(first, everyone, Path(), Path('members'))
    return _timed(run) | {'members': len(everyone)}


def _timed(run: Any) -> Found:
    """Take an epoch's steps, after two that compile and warm up; tell their arithmetic, too.

    The machine's rate is the faster of that before and that after the steps.
    """
    import jax

    from experiments.bench import programs

    dtype = run.config.training.dtype
    flops = _flops_of_first_step(run)
    jax.block_until_ready(run.take_step())
    before = programs.product_rate(dtype)
    started = time.perf_counter()
    for _ in range(run.steps_per_epoch):
        last = run.take_step()
    jax.block_until_ready(last)
    return {
        'seconds': time.perf_counter() - started,
        'steps': run.steps_per_epoch,
        'padding': run.padding,
        'flops': run.steps_per_epoch * flops,
        'product_rate': max(before, programs.product_rate(dtype)),
    }


def _flops_of_first_step(run: Any) -> float:
    """Take a step; return the arithmetic of its products, but for those of a GPU's kernels."""
    from adapters_jax.training.flops import product_flops

    step, found = run.train_step, []

    def counted(*given: Any) -> Any:
        found.append(product_flops(step.trace(*given).jaxpr))
        return step(*given)

    run.train_step = counted
    run.take_step()
    run.train_step = step
    return found[0]


def _their_epoch(course: Mapping[str, Any]) -> Found:
    import adapters
    import torch
    import transformers

    from experiments.bench import libraries

    device = libraries.prepare()
    rows = [json.loads(line) for line in Path(course['data']).read_text().splitlines()]
    labels = sorted({row['label'] for row in rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(course['backbone'])
    fields = ('text_a', 'text_b') if 'text_a' in rows[0] else ('text',)
    texts = [[row[field] for row in rows] for field in fields]
    encoded = tokenizer(*texts, truncation=True, max_length=128)
    examples = [
        {name: encoded[name][i] for name in ('input_ids', 'attention_mask', 'token_type_ids')}
        | {'labels': labels.index(rows[i]['label'])}
        for i in range(len(rows))
    ]
    model = libraries.adapters_model(
        *(Path(course['backbone']), 'houlsby', course['size'], len(labels)),
        course.get('left_out', ()),
    )
    pad, tokens = transformers.DataCollatorWithPadding(tokenizer), [0, 0]

    def collate(batch: list[dict[str, Any]]) -> Any:
        padded = pad(batch)
        tokens[0] += sum(len(example['input_ids']) for example in batch)
        tokens[1] += padded['input_ids'].numel()
        return padded

    arguments = transformers.TrainingArguments(
        output_dir='.',
        per_device_train_batch_size=course['batch_size'],
        num_train_epochs=1,
        learning_rate=1e-4,
        report_to=[],
        save_strategy='no',
        logging_strategy='no',
        disable_tqdm=True,
        use_cpu=device == 'cpu',
        bf16=course['dtype'] == 'bfloat16',
    )
    trainer = adapters.AdapterTrainer(
        model=model, args=arguments, train_dataset=examples, data_collator=collate
    )
    started = time.perf_counter()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    steps = math.ceil(len(rows) / course['batch_size'])
    return {'seconds': seconds, 'steps': steps, 'padding': 1 - tokens[0] / tokens[1]}


def first_step(side: str, started: float, cache: str = '', **course: Any) -> Found:
    """Import, load the backbone and take one training step; counted from the process's start.

    `cache` is the folder of compiled programs, of ours.
    """
    if side == 'ours':
        import jax

        if cache:
            jax.config.update('jax_compilation_cache_dir', cache)
            jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    step = _step(side, **course)
    step()
    return {'seconds': time.time() - started}


def peak_memory(side: str, steps: int = 3, **course: Any) -> Found:
    """Take some training steps; return the most memory that the process, or its device, held."""
    step = _step(side, **course)
    for _ in range(steps):
        step()
    return {'mebibytes': _peak_bytes(side) / 2**20}


def _peak_bytes(side: str) -> int:
    if side == 'ours':
        import jax

        statistics = jax.devices()[0].memory_stats()
        if jax.default_backend() != 'cpu':
            return statistics['peak_bytes_in_use']
    elif 'torch' in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return allocator.peak_bytes()


def _step(side: str, backbone: str, size: int, rows: int, tokens: int, dtype: str, **_: Any) -> Any:
    """Return a training step of one side (both put bottlenecks at both places)."""
    import numpy as np

    if side == 'ours':
        import jax

        from adapters_jax.interop.backbones import load_backbone
        from experiments.bench import programs

        loaded = load_backbone(backbone)
        batch = programs.random_batch(rows, tokens, loaded.config.vocabulary)
        made = programs.make(loaded, f'double_seq_bn[size={size}]', dtype)
        call = programs.training(*made, batch).call
        return lambda: jax.block_until_ready(call())
    from experiments.bench import libraries

    rng = np.random.default_rng(0)
    batch = {
        'input_ids': rng.integers(1, 30522, (rows, tokens)),
        'label': rng.integers(0, 2, (rows, 1)),
    }
    model = libraries.adapters_model(Path(backbone), 'houlsby', size, 2)
    return libraries.train_step(model, batch, dtype, compiled='')


def imports(side: str, started: float, **_: Any) -> Found:
    """Import what training needs."""
    importlib.import_module(IMPORTS[side])
    return {'seconds': time.time() - started}


JOBS = {job.__name__: job for job in (epoch, sweep, first_step, peak_memory, imports)}


def main(given: str) -> None:
    """Do the job and print what it found."""
    job = json.loads(given)
    if job['side'] == 'ours':
        from adapters_jax import entry

        entry.without_frameworks()  # as each of our commands does
        allocator.keep_freed()
    print(json.dumps(JOBS[job.pop('job')](**job)), flush=True)


if __name__ == '__main__':
    main(sys.argv[1])
