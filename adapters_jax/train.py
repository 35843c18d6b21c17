"""Train an adapter: `python -m adapters_jax.train --config=configs/quickstart.py --workdir=DIR`.

Run again with the same config and workdir, it continues from the last checkpoint; a finished run
says so. The workdir then holds `adapter/` (the best one on the validation split), `summary.json`,
`metrics.jsonl`, `config.json`, `data.json`, `log.txt`, `tensorboard/` and `checkpoints/`.
"""

import logging
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from adapters_jax import entry, files, processes
from adapters_jax.config import Config, decisive, differences, is_place, read, to_json
from adapters_jax.training import experiment, loop, multitask, multitask_run
from adapters_jax.training.progress import CHECKPOINTS, CONFIG, SUMMARY, read_end

_LOG = logging.getLogger('adapters_jax.train')  # __name__ is '__main__' on the command line


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Train what `config` describes in `workdir`, and return the summary that is written there.

    A config is made by `get_config` of a file in configs/; its keys are those of `defaults`.

    Raises:
        ValueError, FileNotFoundError: a mistake in the config or the data, before any step.
        NonFiniteLossError: the loss stopped being a number.
    """
    workdir = Path(workdir)
    with processes.locked(workdir):
        with processes.together():
            check_same_run(config, workdir)
            summary = workdir / SUMMARY
            if summary.exists():
                _LOG.info('%s is finished already; another --workdir trains again', workdir)
                return read_end(summary)
            loop.check(config)
            built = multitask.build(config) if config.tasks else experiment.build(config)
            check_same_elsewhere(config, built)
        kind = multitask_run.MultitaskRun if config.tasks else loop.Trainer
        trainer = kind(built, workdir)
        # Written only now: a config with a mistake in it makes no claim on the workdir.
        if processes.is_writer():
            files.write_json(workdir / CONFIG, to_json(config))
        values = trainer.run()
        if processes.is_writer():
            files.write_json(summary, values)
        return values


def check_same_run(config: Config, workdir: Path) -> None:
    """Refuse a workdir that holds a run with other settings.

    Where it has a checkpoint and no end yet, backbone and data may have moved: that they are the
    same is looked at when it is restored.

    Raises:
        ValueError: the settings that differ, with both values.
    """
    path = workdir / CONFIG
    begun = not (workdir / SUMMARY).exists() and any((workdir / CHECKPOINTS).glob('[0-9]*'))
    changed = differences(read(path), config, anywhere=begun) if path.exists() else []
    if changed:
        raise ValueError(
            f'{workdir} holds a run with another config ({"; ".join(changed)}); give the same '
            'config to continue it, or another --workdir'
        )


def check_same_elsewhere(config: Config, built: experiment.Experiment) -> None:
    """Refuse processes that are to train one run, but have other settings or files.

    Raises:
        ValueError: not the same config, or not the same files, as process 0 has.
    """
    parts = {'backbone': built.backbone.fingerprint, 'data': built.fingerprints}
    parts |= {'adapters': built.adapters_fingerprint}
    settings = {key: value for key, value in decisive(config).items() if not is_place(key)}
    processes.check_alike({'config': settings} | parts)


def main(config: Config, workdir: str) -> None:
    """Train, and print what was reached and written."""
    summary = train(config, workdir)
    for split, metrics in summary['metrics'].items():
        step = summary.get('best_steps', {}).get(split, summary['best_step'])
        print(f'best on {split}, at step {step}:\n{entry.table(metrics)}')
    print(f'wrote {workdir}: adapter/, summary.json, metrics.jsonl, config.json, log.txt')


def _define() -> dict[str, flags.FlagHolder]:
    config = config_flags.DEFINE_config_file('config', None, 'FILE.py[:key=value,...]')
    workdir = flags.DEFINE_string('workdir', None, 'Directory of the run.')
    return {'config': config, 'workdir': workdir}


if __name__ == '__main__':
    entry.run_on_many(_define, main)
