"""Choose among the candidates that come with each question: SWAG, COPA, RACE, ARC, or your own.

    python -m adapters_jax.train --config=configs/multiple_choice.py --workdir=W \
        --config.data.train=questions.jsonl
    python -m adapters_jax.predict --adapter=W/adapter --input=in.jsonl --output=out.jsonl

A line of JSONL is {"context": "...", "question": "...", "choices": ["...", "..."], "label": 1},
with a context, a question, or both; questions may have different numbers of candidates. Tables
with a column for each candidate (ending0, choice1, answerA, ...), and the names that the usual data
sets have, are in adapters_jax/data/choices.py.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='houlsby', backbone='minilm')
    config = base()
    config.task.name = 'multiple_choice'
    config.method = given.method
    config.backbone = given.backbone
    # The first token's state decides which text fits, as in the papers.
    config.head.pooling = 'cls'
    config.training.batch_size = 16
    config.training.epochs = 3.0
    return config
