"""The config of a workdir that is there: a member of a sweep by itself, or a run with a change.

    python -m adapters_jax.train --config=configs/again.py:runs/tuned/members/trial-0006 \
        --config.training.steps=1200 --workdir=W

The argument is the workdir of a run, or a member's folder in that of a sweep.
"""

from pathlib import Path

from adapters_jax.config import Config, read


def get_config(argument: str | None = None) -> Config:
    if not argument:
        raise ValueError('expected a workdir after the colon: configs/again.py:WORKDIR')
    return read(Path(argument) / 'config.json')
