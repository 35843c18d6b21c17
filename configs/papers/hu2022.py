"""Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models": a row on a task.

    python -m adapters_jax.sweep --config=configs/papers/hu2022.py:task=cola \
        --config.data.dir=GLUE --workdir=W
    python -m experiments.hu2022 --scale=small --data=DATA --output=DIR     # all of the paper

`lora` is table 9 for RoBERTa-base: 5 seeds, of which the paper reports medians and our report
means. `full`, `bitfit` and `adapter` are not in that table and take LoRA's batch size and epochs on
the same task; their rates are ours. LoRA's runs on MRPC, RTE and STS-B begin with the adapter of
MNLI: `--config.start=DIR`, which `experiments.hu2022` gives. `ranks` is table 6 (18) and `matrices`
table 5, both of GPT-3 in the paper; `adapter` stands for its AdapterD, one adapter after each
feed-forward network.

The published code (`source=code`) has alpha 16 instead of 8, a weight decay of 0.1, and eight GPUs
with 16 examples each instead of a batch of 16 or 32. Its README counts 0.8M trained parameters
where the paper has 0.3M; with r = 8 at query and value there are 0.3M, and the head.
"""

import dataclasses
from typing import Any

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import RATE, Way

# Table 9: batch size, epochs, learning rate.
SETTINGS = {
    'mnli': (16, 30.0, 5e-4),
    'sst2': (16, 60.0, 5e-4),
    'mrpc': (16, 30.0, 4e-4),
    'cola': (32, 80.0, 4e-4),
    'qnli': (32, 25.0, 4e-4),
    'qqp': (16, 25.0, 5e-4),
    'rte': (32, 80.0, 5e-4),
    'stsb': (16, 40.0, 4e-4),
}
# What the paper reports where GLUE has several metrics. Of MNLI it is both dev sets together; ours
# is the matched one.
METRICS = {'mrpc': 'accuracy', 'qqp': 'accuracy', 'stsb': 'pearson'}
START, FROM_IT = 'mnli', ('mrpc', 'rte', 'stsb')
# Table 5: the same number of parameters, in one kind of matrix with rank 8 or spread over several.
MATRICES = ('[q],r=8', '[k],r=8', '[v],r=8', '[o],r=8', '[q,k],r=4', '[q,v],r=4', '[q,k,v,o],r=2')
_MATRICES = tuple(f'lora[attn_matrices={text},alpha=8]' for text in MATRICES)
_ONE_RATE = {RATE: (3e-3,)}
WAYS = {
    'lora': Way('lora[r=8,alpha=8]', {}),
    'full': protocol.full({RATE: (1e-5, 2e-5, 3e-5)}),
    'bitfit': Way('bitfit', {RATE: (1e-4, 5e-4, 1e-3)}),
    'adapter': Way('pfeiffer[size=16]', {RATE: (1e-4, 3e-4)}),
    'ranks': Way(
        'lora[alpha=8]', {'method.r': (1, 2, 4, 8, 64)}, _ONE_RATE | {'method.r': (1, 2, 8, 64)}
    ),
    'matrices': Way('lora', {'method': _MATRICES}, _ONE_RATE | {'method': _MATRICES}),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS, protocol.BOTH)
    way = WAYS[given.way]
    name = protocol.whole(given.task)
    if given.scale == 'full' and name not in SETTINGS:
        raise ValueError(f'task is {given.task!r}; the paper has {", ".join(SETTINGS)}')
    if given.source == 'code':
        way = _with_alpha(way)
    config = protocol.sweep(given, way, 'roberta-base', seeds=5)
    if given.scale == 'full':
        config.optimizer.warmup = 0.06
        config.task.primary = METRICS.get(name, config.task.primary)
        batch_size, epochs, rate = SETTINGS[name]
        config.training.batch_size = batch_size
        config.training.epochs = epochs
        config.optimizer.learning_rate = rate
        config.data.max_length = 512
        config.head.pooling = 'cls'
        if given.source == 'code':
            config.training.batch_size = 128
    if given.source == 'code':
        config.optimizer.weight_decay = 0.1
    return config


def _with_alpha(way: Way) -> Way:
    """Return a way with the alpha of the published code, in its method and in those of its axes."""

    def changed(value: Any) -> Any:
        return value.replace('alpha=8', 'alpha=16') if isinstance(value, str) else value

    axes, small = (
        {key: tuple(map(changed, values)) for key, values in own.items()}
        for own in (way.axes, way.small)
    )
    return dataclasses.replace(way, method=changed(way.method), axes=axes, small=small)
