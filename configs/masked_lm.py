"""Train a language (or domain) adapter on texts without labels, as MAD-X does.

    python -m adapters_jax.train --config=configs/masked_lm.py --config.data.train=swahili.txt \
        --workdir=runs/sw    # :backbone=xlm-roberta-base,method=seq_bn_inv
    python -m adapters_jax.evaluate --workdir=runs/sw --split=validation
    python -m adapters_jax.predict --adapter=runs/sw/adapter --input=in.jsonl --output=out.jsonl

A .txt file has one text a line; tables have a column of texts (`text`, or data.columns.text_a).
Long texts are cut into parts. The backbone's own language head is used and stays as it is; one that
the checkpoint lacks is trained. Then the adapter goes below others:

    --config.adapters=sw=runs/sw/adapter,task=pfeiffer --config.method='stack(sw, task)'
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='seq_bn_inv', backbone='bert-base-multilingual-cased')
    config = base()
    config.task.name = 'masked_lm'
    config.method = given.method
    config.backbone = given.backbone
    # Pfeiffer et al. 2020, section 4.3, but for the number of steps (250,000 there).
    config.optimizer.learning_rate = 1e-4
    config.training.batch_size = 64
    config.training.epochs = 10.0
    config.training.patience = 3
    return config
