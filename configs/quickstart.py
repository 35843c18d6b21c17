"""Questions by type (TREC, Li & Roth 2002) with Houlsby adapters on a six-layer BERT.

    bash launch/quickstart.sh
    python -m adapters_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Six classes; 1,001 held-out test questions share no text with the training questions.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='houlsby', backbone='minilm')
    config = base()
    config.backbone = given.backbone
    config.method = given.method
    config.data.name = 'trec'
    # 500 questions choose the best step, 1,000 are held out.
    config.data.split_fractions = (500 / 5382, 1000 / 5382)
    config.data.max_length = 64
    config.task.metrics = ('accuracy', 'f1_macro', 'precision_macro', 'recall_macro')
    config.task.primary = 'accuracy'
    config.optimizer.learning_rate = 2e-3
    config.training.epochs = 6.0
    return config
