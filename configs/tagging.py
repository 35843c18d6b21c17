"""Tag words: parts of speech, named entities, or any other tags, from your own files.

    python -m adapters_jax.train --config=configs/tagging.py:method=pfeiffer --workdir=W \
        --config.data.dir=DIR    # DIR holds train.*, dev.* and, if there is one, test.*
    python -m adapters_jax.evaluate --workdir=W --split=test
    python -m adapters_jax.predict --adapter=W/adapter --input=in.jsonl --output=out.jsonl

CoNLL-U (UPOS, or `--config.data.columns.label=XPOS`), CoNLL columns (the word first, the tag last,
or `--config.data.columns.label=1`), or JSONL of {"tokens": [...], "tags": [...]}; also .gz, and a
hub data set (`--config.data.name=...`). The scheme of spans (BIO, IOB1, IOBES, BILOU) is detected.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='pfeiffer', backbone='minilm')
    config = base()
    config.task.name = 'tagging'
    config.method = given.method
    config.backbone = given.backbone
    config.optimizer.learning_rate = 2e-3
    config.training.epochs = 5.0
    return config
