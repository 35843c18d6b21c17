"""Classify (or rate) your own texts, from any local file or a hub data set.

    python -m adapters_jax.train --config=configs/text_classification.py --workdir=W \
        --config.data.train=reviews.csv
    python -m adapters_jax.train --config=configs/text_classification.py:task=regression \
        --config.data.dir=DIR --workdir=W    # DIR holds train.* (and validation.*, test.*)

`task=multi_label` gives each text any number of classes: a list in JSONL, or a cell with the names
between commas (`--config.data.label_separator=';'` for another sign).

CSV, TSV, JSONL, JSON, Parquet and text files, also .gz. Columns are found by their names (`text`,
`sentence1` and `sentence2`, `label`, ...) or named: `--config.data.columns.text_a=question`.
Without a validation file a tenth of the training file is held out, and one more for the test where
there is no test file either.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, task='classification', method='houlsby', backbone='minilm')
    config = base()
    config.task.name = given.task
    config.method = given.method
    config.backbone = given.backbone
    config.training.epochs = 20.0
    config.training.patience = 5
    return config
