"""The short runs that the campaign disturbs, and what each of them leaves in its workdir."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from adapters_jax.training import manifest
from experiments import toy

STEPS, CHECKPOINT_EVERY, EVALUATE_EVERY = 60, 7, 20
# What a summary holds that is another number each time, or says where something lay.
_VOLATILE = ('seconds', 'examples_per_second', 'peak_memory_bytes', 'cache_dir', 'compilations')
_NOT_RESULTS = ('checkpoints', 'tensorboard', 'log.txt')
TEMPORARY = ('.*.tmp', '.*.previous', '*orbax-checkpoint-tmp*')


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run: a command, its config file, and what is changed there."""

    name: str
    config: str
    changes: tuple[str, ...] = ()
    command: str = 'train'
    backbone: str = 'bert'

    def arguments(self, toys: Path, folder: Path) -> list[str]:
        """Return the command line of a run in `folder`/run, of toys that `write_toys` wrote."""
        common = {
            'backbone': toys / self.backbone,
            'data.cache_dir': folder / 'cache',
            'mesh.data': 1,
            'optimizer.learning_rate': 0.01,
            'training.steps': STEPS,
            'training.checkpoint_every': CHECKPOINT_EVERY,
            'training.evaluate_every': EVALUATE_EVERY,
            'training.patience': 0,
        }
        given = [f'--config.{key}={value}' for key, value in common.items()]
        own = [change.format(toys=toys) for change in self.changes]
        return [f'--config=configs/{self.config}', f'--workdir={folder / "run"}', *given, *own]


_ONE = '--config.data.train={toys}/texts.csv'
_TEXTS = 'text_classification.py:method='
KINDS = (
    Kind('one adapter, packed', f'{_TEXTS}pfeiffer[reduction_factor=2,dropout=0.1]', (_ONE,)),
    Kind(
        'biases, in buckets, accumulated',
        f'{_TEXTS}bitfit',
        (_ONE, '--config.data.batching=buckets', '--config.training.accumulate=2'),
    ),
    Kind(
        'stored trunk',
        f'{_TEXTS}pfeiffer[reduction_factor=2,leave_out=[0]]',
        (_ONE, '--config.training.trunk_cache=float32'),
        backbone='deeper',
    ),
    Kind(
        'two tasks',
        'multitask.py:tasks=topic+stars,method=lora[r=2]',
        (
            '--config.tasks.topic.data.train={toys}/texts.csv',
            '--config.tasks.stars.data.train={toys}/ratings.csv',
            '--config.tasks.stars.task.name=regression',
        ),
    ),
    Kind(
        'sweep of two populations',
        f'{_TEXTS}pfeiffer[size=4,dropout=0.1]',
        (
            *(_ONE, '--config.data.seed=0', '--config.sweep.size=2', '--config.training.steps=30'),
            "--config.sweep.grid=('seed=0,1','optimizer.learning_rate=1e-2,3e-2')",
        ),
        command='sweep',
    ),
)


def write_toys(folder: Path) -> Path:
    """Write the backbone and the data; return the folder."""
    toy.write_backbone(folder / 'bert')
    toy.write_backbone(folder / 'deeper', layers=2)
    toy.write_texts(folder / 'texts.csv')
    toy.write_ratings(folder / 'ratings.csv')
    return folder


def parts(workdir: Path) -> list[Path]:
    """Return the directories with checkpoints of their own, in order; the last is under way."""
    populations = sorted((workdir / 'populations').glob('*'))
    return populations or [workdir]


def steps_taken(workdir: Path) -> int:
    """Return how many steps the part under way has recorded."""
    path = parts(workdir)[-1] / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def checkpoints(workdir: Path) -> dict[int, Path]:
    """Return the checkpoints of the part under way by step."""
    found = (parts(workdir)[-1] / 'checkpoints').glob('*')
    return {int(path.name): path for path in found if path.name.isdecimal()}


def newest(workdir: Path) -> int:
    """Return the step of the newest sound checkpoint of the part under way, 0 without any."""
    found = checkpoints(workdir).items()
    return max((step for step, path in found if manifest.find_fault(path) is None), default=0)


def writes_checkpoint(workdir: Path) -> bool:
    """Tell whether a checkpoint is being written."""
    return any((parts(workdir)[-1] / 'checkpoints').glob('*orbax-checkpoint-tmp*'))


def replaces_adapter(workdir: Path) -> bool:
    """Tell whether an adapter is being written or put in the place of the one before."""
    places = ('.adapter.*', 'adapter/.*', 'members/*/.adapter.*')
    return any(path for place in places for path in workdir.glob(place))


def temporary(folder: Path) -> list[Path]:
    """Return what has a temporary name."""
    return [path for pattern in TEMPORARY for path in folder.rglob(pattern)]


def flaws(workdir: Path, damaged: set[Path]) -> Iterator[str]:
    """Yield what is wrong with a file that has a final name, but for those damaged on purpose."""
    for path in _final(workdir):
        if any(path.is_relative_to(other) for other in damaged) or 'damaged-' in str(path):
            continue
        try:
            if path.suffix == '.json':
                json.loads(path.read_bytes())
            elif path.suffix == '.safetensors':
                load_file(path)
            elif path.suffix == '.jsonl':
                yield from _flaws_of_lines(path)
        except Exception as error:
            yield f'{path.relative_to(workdir)}: {type(error).__name__}: {error}'
    for step, path in checkpoints(workdir).items():
        # One that is older than a sound one may be half deleted.
        if step > newest(workdir) and path not in damaged:
            yield f'checkpoint {step}: {manifest.find_fault(path)}'


def _final(workdir: Path) -> Iterator[Path]:
    """Yield the files of a workdir that have no temporary name, nor a parent that has."""
    hidden = re.compile(r'(^|/)(\.|[^/]*orbax-checkpoint-tmp)')
    for path in workdir.rglob('*'):
        if path.is_file() and not hidden.search(str(path.relative_to(workdir))):
            yield path


def _flaws_of_lines(path: Path) -> Iterator[str]:
    """Yield what is wrong with a metrics file; a kill may have cut its last line."""
    *whole, rest = path.read_text().split('\n')
    lines = [json.loads(line) for line in whole]
    steps = [line['step'] for line in lines if line['split'] == 'train']
    if steps != list(range(1, len(steps) + 1)):
        yield f'{path.name} has the steps {steps}'
    if rest and len(rest) > 1000:
        yield f'{path.name} ends in {rest!r}'


def results(workdir: Path) -> dict[str, Any]:
    """Return what a finished run's workdir holds of results: bits, or JSON without the times."""
    found: dict[str, Any] = {}
    for path in _final(workdir):
        name = path.relative_to(workdir)
        if set(name.parts) & set(_NOT_RESULTS):
            continue
        content = path.read_bytes()
        whole = path.suffix != '.json' or 'adapter' in name.parts
        digest = hashlib.sha256(content).hexdigest()
        found[str(name)] = digest if whole else _steady(json.loads(content))
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in _VOLATILE}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of results that are missing, too many or different."""
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))
