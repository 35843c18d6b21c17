"""Which adapter to take for a task: a short list of methods and sizes, tried on a small budget.

    python -m adapters_jax.sweep --config=configs/choose.py:task=trec --workdir=W
    python -m adapters_jax.sweep --config=configs/choose.py:task=rte --workdir=W \
        --config.data.dir=GLUE                       # GLUE/RTE/train.tsv, dev.tsv
    python -m adapters_jax.sweep --config=configs/choose.py:task=regression --workdir=W \
        --config.data.train=ratings.csv              # or task=classification: your own texts

`task` is a built-in data set, a task of GLUE, or what your own texts are for. Every method is tried
with two learning rates; after a quarter and after half of the `steps`, the better half of all goes
on. Recommended is the cheapest method within `--config.sweep.margin` of the best score.
"""

from adapters_jax import config as configs
from adapters_jax import tasks
from adapters_jax.config import Config, parse_arg
from adapters_jax.data import builtin
from adapters_jax.data import glue as glue_tasks
from configs import (
    glue,
    images,
    masked_lm,
    multiple_choice,
    question_answering,
    seq2seq,
    speech,
    tagging,
    text_classification,
)

# Kinds of tasks with a config file of their own, which knows their lengths and heads.
KINDS = {
    'image_classification': images,
    'masked_lm': masked_lm,
    'multiple_choice': multiple_choice,
    'question_answering': question_answering,
    'seq2seq': seq2seq,
    'speech_recognition': speech,
    'tagging': tagging,
}

METHODS = (
    'pfeiffer[size=8]',
    'pfeiffer[size=64]',
    'houlsby[size=8]',
    'houlsby[size=64]',
    'par_bn[size=32]',
    'lora[r=4]',
    'lora[r=16]',
    'compacter',
    'prefix_tuning_flat',
    'ia3',
    'bitfit',
    'attention[size=32]',
    'head',
)
RATES = (1e-3, 5e-3)


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(
        argument, task='trec', backbone='minilm', steps=160, methods=METHODS, rates=RATES
    )
    config = data(given.task, given.backbone)
    config.training.steps = given.steps
    config.training.patience = 0
    config.sweep.grid = (
        f'method={",".join(given.methods)}',
        f'optimizer.learning_rate={",".join(map(str, given.rates))}',
    )
    config.sweep.pruner = 'halving'
    config.sweep.reduction = 2.0
    config.sweep.recommend = True
    return config


def data(task: str, backbone: str) -> Config:
    """Return the config of a task of GLUE, a built-in data set or a kind of tasks, not swept yet.

    Raises:
        ValueError: none of these; the known ones are listed.
    """
    if glue_tasks.key_of(task) in glue_tasks.TASKS:
        return glue.get_config(f'task={task},backbone={backbone}')
    if task in KINDS:
        return KINDS[task].get_config(f'backbone={backbone}')
    if task not in builtin.SETS:
        if task not in tasks.names():
            known = *glue_tasks.TASKS, *builtin.SETS, *tasks.names()
            raise ValueError(f'unknown task {task!r}; known: {", ".join(known)}')
        return text_classification.get_config(f'task={task},backbone={backbone}')
    config = configs.base()
    config.backbone = backbone
    config.data.name = task
    config.data.max_length = 64
    return config
