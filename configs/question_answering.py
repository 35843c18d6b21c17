"""Find the answer to a question in a text: SQuAD 1.1 and 2.0, or your own questions.

    python -m adapters_jax.train --config=configs/question_answering.py --workdir=W \
        --config.data.train=train-v2.0.json --config.data.validation=dev-v2.0.json
    python -m adapters_jax.evaluate --workdir=W --split=validation
    python -m adapters_jax.predict --adapter=W/adapter --input=in.jsonl --output=out.jsonl

SQuAD's JSON, the same in JSONL, CSV and Parquet tables with the columns question, context, answer
and answer_start, or a hub id (`--config.data.name=squad_v2`). A question without an answer is one
that its context does not answer. Without validation and test files a tenth of the paragraphs each
is held out.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='houlsby', backbone='minilm')
    config = base()
    config.backbone = given.backbone
    config.method = given.method
    config.task.name = 'question_answering'
    # The windows of Devlin et al. (2019) and of the scripts that came with BERT.
    config.data.max_length = 384
    config.training.epochs = 2.0
    return config
