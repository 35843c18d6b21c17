"""What one race of ours against theirs leaves, and how races of whole processes are run."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.bench.timing import Times, order

# Of ours where a job is `launched`, as launch/environment.sh has it. Set for the bench itself, both
# sides have it.
LAUNCHED = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
# What a worker does not have of the shell: a side that wants torch says so itself, and the other
# does without (`adapters_jax.entry`); compiled programs are found where the job says, or nowhere.
_OWN = ('USE_TORCH', 'JAX_COMPILATION_CACHE_DIR')


@dataclasses.dataclass(frozen=True)
class Race:
    """The same work done by both, in turns.

    `unit` is that of `ours` and `theirs` ('s', 'MiB' of memory, or 'kB' on disk); `more` is what
    else is known of ours, such as its share of the machine's rate.
    """

    title: str
    ours: Times
    theirs: Times
    settings: Mapping[str, Any]
    unit: str = 's'
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return medians, the ratio theirs / ours with the middle half of its rounds, settings."""
        ratio = self.theirs.over(self.ours)
        return {
            'title': self.title,
            'ours': self.ours.median,
            'theirs': self.theirs.median,
            'unit': self.unit,
            'ratio': ratio.value,
            'spread': [ratio.low, ratio.high],
            'rounds': {'ours': list(self.ours.seconds), 'theirs': list(self.theirs.seconds)},
            'settings': {key: _without_folder(value) for key, value in self.settings.items()},
            **self.more,
        }


def _without_folder(setting: Any) -> Any:
    """Return the name of a file or folder, since where it lies says nothing to others."""
    is_path = isinstance(setting, str) and Path(setting).is_absolute()
    return Path(setting).name if is_path else setting


def of_processes(
    jobs: Mapping[str, Mapping[str, Any]], rounds: int, field: str
) -> tuple[dict[str, Times], dict[str, dict[str, Any]]]:
    """Run each job in a process of its own, in turns; return one of the numbers that they report.

    The second value is what each job reported in the last round.

    Raises:
        CalledProcessError: a job failed; what it printed is in the message's `stderr`.
    """
    found: dict[str, list[float]] = {name: [] for name in jobs}
    last: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name in order(list(jobs), number):
            last[name] = report(jobs[name])
            found[name].append(last[name][field])
    return {name: Times(tuple(values)) for name, values in found.items()}, last


def report(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job (`workers.JOBS`) in a process of its own; return what it reports."""
    given = json.dumps({**job, 'started': time.time()})
    command = [sys.executable, '-m', 'experiments.bench.workers', given]
    environment = {name: value for name, value in os.environ.items() if name not in _OWN}
    if job['side'] == 'ours':
        # As the course says, whatever the shell that started the bench has.
        environment |= {'JAX_NUM_CPU_DEVICES': str(job.get('devices', 1))}
        environment = (LAUNCHED if job.get('launched') else {}) | environment
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
