"""A small BERT without weights: what the dumps in this folder are of.

    python -m adapters_jax.compile --config=tests/goldens/small.py:method=lora --devices=8 \
        --config.mesh.fsdp=8 --output=DIR         # DIR/shardings.txt is a dump
    python tests/test_compile.py                  # writes all dumps anew
"""

from pathlib import Path

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='pfeiffer[reduction_factor=2]')
    config = base()
    config.backbone = str(Path(__file__).parent / 'bert')
    config.method = given.method
    config.task.labels = ('no', 'yes', 'perhaps')
    config.data.max_length = 16
    config.training.batch_size = 16
    return config
