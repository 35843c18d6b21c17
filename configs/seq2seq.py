"""A text for a text: translation, summarisation.

    python -m adapters_jax.train --config=configs/seq2seq.py:method=lora,backbone=t5-small \
        --config.data.dir=DIR --config.data.languages=en,de \
        --config.task.prefix='translate English to German: ' --workdir=W

DIR has train.en and train.de (a text a line; also .gz), and so for validation and test, or a table
train.tsv, train.jsonl with the columns `source` and `target`. Reported are BLEU and chrF by
sacrebleu, and the cross-entropy of a token.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='houlsby', backbone='t5-small')
    config = base()
    config.task.name = 'seq2seq'
    config.backbone, config.method = given.backbone, given.method
    return config
