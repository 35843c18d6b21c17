"""The faults: what is done to a run, at which moment, and how it must end.

A fault is given the attempt under way and decides by the campaign's generator of random numbers.
"""

import dataclasses
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.commands import Command, Finished
from experiments.faults import runs

STOPPED = re.compile(r'stopped by (SIG\w+)')
_LONGEST = 240.0  # seconds that an attempt may take before it counts as hanging


@dataclasses.dataclass
class Attempt:
    """One start of a run's command, to be disturbed.

    `start` starts the command, `seconds` is what a whole undisturbed run takes. `damaged` has the
    checkpoints spoilt on purpose, in this attempt or before, with their inodes.
    """

    start: Callable[..., Command]
    workdir: Path
    seconds: float
    random: random.Random
    damaged: dict[Path, int] = dataclasses.field(default_factory=dict)
    moment: str = ''

    def still_damaged(self) -> set[Path]:
        """Return those spoilt that lie where they lay, nor set aside and written anew since."""
        found = {path: path.stat().st_ino for path in self.damaged if path.exists()}
        return {path for path, inode in found.items() if inode == self.damaged[path]}

    def wait(self, command: Command, moments: tuple[str, ...]) -> bool:
        """Wait for a random moment of these kinds; tell whether the command still runs then."""
        kind = self.random.choice(moments)
        first = runs.steps_taken(self.workdir)
        step = self.random.randint(first + 1, first + max(2, (runs.STEPS - first) // 2))
        seconds = self.random.uniform(0, 0.8 * self.seconds)
        end = time.monotonic() + seconds
        conditions = {
            'time': lambda: time.monotonic() >= end,
            'step': lambda: runs.steps_taken(self.workdir) >= step,
            'checkpoint': lambda: runs.writes_checkpoint(self.workdir),
            'replacement': lambda: runs.replaces_adapter(self.workdir),
        }
        if kind == 'time':
            self.moment = f'after {seconds:.2f} s'
        else:
            self.moment = f'step {step}' + f' or later, {kind} written' * (kind != 'step')
            command.wait_for(conditions['step'], _LONGEST)
        command.wait_for(conditions[kind], _LONGEST)
        return command.running


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a disturbed attempt ended: whether the fault came in time, and what was not as it ought.

    `told` is what else the record of the attempt tells of the fault.
    """

    hit: bool
    finished: Finished
    surprises: tuple[str, ...] = ()
    told: dict[str, Any] = dataclasses.field(default_factory=dict)


def _unless(done: Finished, *statuses: int) -> tuple[str, ...]:
    """Return the exit status as a surprise unless it is one of these."""
    return () if done.status in statuses else (f'exit status {done.status}',)


def kill(*moments: str) -> Callable[[Attempt], Ended]:
    """SIGKILL at a moment of these kinds."""

    def inject(attempt: Attempt) -> Ended:
        command = attempt.start()
        if attempt.wait(command, moments):
            command.signal(signal.SIGKILL)
        done = command.finish(_LONGEST)
        return Ended(done.status == -signal.SIGKILL, done, _unless(done, 0, -signal.SIGKILL))

    return inject


def stop(*numbers: int) -> Callable[[Attempt], Ended]:
    """Send signals that ask the run to end: it saves its state, says so and exits with 128 + n."""

    def inject(attempt: Attempt) -> Ended:
        command = attempt.start()
        hit = attempt.wait(command, ('time', 'step', 'checkpoint'))
        for number in numbers:
            if command.running:
                command.signal(number)
            if number != numbers[-1]:
                time.sleep(attempt.random.uniform(0, 0.3))
        done = command.finish(_LONGEST)
        return Ended(hit and done.status != 0, done, tuple(_unlike_a_stop(done, numbers)))

    return inject


def _unlike_a_stop(done: Finished, numbers: tuple[int, ...]) -> list[str]:
    # Before the program has begun, the system ends the process; it has no state by then.
    allowed = [0, -numbers[0], 128 + numbers[0]]
    allowed += [-signal.SIGKILL] if signal.SIGKILL in numbers else []
    found = [*_unless(done, *allowed)]
    if done.status == 128 + numbers[0] and not STOPPED.search(done.err):
        found.append('no word of the signal')
    return found


def damage(how: str) -> Callable[[Attempt], Ended]:
    """SIGKILL, and then damage to a random file of the newest checkpoint."""

    def inject(attempt: Attempt) -> Ended:
        ended = kill('step', 'checkpoint')(attempt)
        newest = max(runs.checkpoints(attempt.workdir).items(), default=None)
        if not ended.hit or newest is None:
            return dataclasses.replace(ended, hit=False)
        files = sorted(path for path in newest[1].rglob('*') if path.is_file())
        victim = attempt.random.choice([path for path in files if path.stat().st_size])
        _DAMAGES[how](victim, attempt.random)
        attempt.damaged[newest[1]] = newest[1].stat().st_ino
        return dataclasses.replace(ended, told={'file': str(victim.relative_to(newest[1]))})

    return inject


def _cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


_DAMAGES = {'cut': _cut, 'flip': _flip, 'delete': lambda path, _: path.unlink()}


def clear_away(attempt: Attempt) -> Ended:
    """SIGKILL while something is written, and then removal of what has a temporary name."""
    ended = kill('checkpoint', 'replacement')(attempt)
    left = runs.temporary(attempt.workdir)
    for path in (p for p in left if not p.name.endswith('.previous')):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it lay in one that is gone
    return dataclasses.replace(ended, hit=ended.hit and bool(left), told={'removed': len(left)})


def fill_disk(attempt: Attempt) -> Ended:
    """No file may grow beyond a random size: what a full disk does, without filling one.

    There is always room for what the command says, which goes to a file, too.
    """
    size = int(2 ** attempt.random.uniform(12, 16))
    attempt.moment = f'files of {size:,} bytes at most'
    done = attempt.start(file_size=size).finish(_LONGEST)
    if done.status == 0:
        return Ended(False, done)
    surprises = [*_unless(done, 2)]
    if 'no room to write' not in done.err or 'free some space' not in done.err:
        surprises.append('no word of the disk')
    return Ended(True, done, tuple(surprises))


def start_twice(attempt: Attempt) -> Ended:
    """Start the command again while it runs: the second is refused, the first goes on."""
    command = attempt.start()
    if not attempt.wait(command, ('step', 'checkpoint')):
        done = command.finish(_LONGEST)
        return Ended(False, done, _unless(done, 0))
    command.signal(signal.SIGSTOP)
    try:
        second = attempt.start().finish(_LONGEST)
    finally:
        command.signal(signal.SIGCONT)
    surprises = [] if second.status == 2 else [f'the second had exit status {second.status}']
    if 'is in use by another run' not in second.err:
        surprises.append('the second was not told of the first')
    first = command.finish(_LONGEST)
    return Ended(True, first, (*surprises, *_unless(first, 0)))


def pause(attempt: Attempt) -> Ended:
    """SIGSTOP, and SIGCONT some time later: nothing but time is lost."""
    command = attempt.start()
    hit = attempt.wait(command, ('time', 'step', 'checkpoint'))
    if hit:
        command.signal(signal.SIGSTOP)
        time.sleep(attempt.random.uniform(0, 1))
        command.signal(signal.SIGCONT)
    done = command.finish(_LONGEST)
    return Ended(hit, done, _unless(done, 0))


FAULTS: dict[str, Callable[[Attempt], Ended]] = {
    'SIGKILL at any time': kill('time', 'step'),
    'SIGKILL in the writing of a checkpoint': kill('checkpoint'),
    'SIGKILL in the replacement of the best adapter': kill('replacement'),
    'SIGTERM': stop(signal.SIGTERM),
    'SIGTERM twice': stop(signal.SIGTERM, signal.SIGTERM),
    'SIGTERM, then SIGKILL': stop(signal.SIGTERM, signal.SIGKILL),
    'Ctrl-C': stop(signal.SIGINT),
    'newest checkpoint: a file cut off': damage('cut'),
    'newest checkpoint: a bit flipped': damage('flip'),
    'newest checkpoint: a file deleted': damage('delete'),
    'half-written files removed': clear_away,
    'full disk': fill_disk,
    'started twice': start_twice,
    'SIGSTOP and SIGCONT': pause,
}
