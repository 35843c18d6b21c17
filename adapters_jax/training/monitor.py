"""What a user sees of a run, and what it leaves on disk for tables and plots.

| where | what |
|---|---|
| `metrics.jsonl` | one object a line: step, split, values; the same however often resumed |
| `log.txt` | the plain lines, with the time of day |
| `tensorboard/` | event files, with examples per second besides |
| stderr | a progress bar on a terminal, plain lines every so many steps elsewhere |
"""

import collections
import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.progress

from adapters_jax import allocator, files
from adapters_jax.lazy import Functions

METRICS, LOG, TENSORBOARD = 'metrics.jsonl', 'log.txt', 'tensorboard'
# tensorboardX imports torch where there is one, which takes seconds.
_writer, _summary, _protocol = (
    Functions(f'tensorboardX.{name}', without='torch')
    for name in ('event_file_writer', 'summary', 'proto.event_pb2')
)
_START = 1  # SessionLog.START

TRAIN = 'train'
_LINES_PER_RUN = 50
_WINDOW = 50  # steps over which speed is averaged


class Monitor:
    """Records a run of `total_steps` steps in `workdir`; only the first process writes anything.

    Use it as a context manager, and call `start` before the first step. Warnings logged by this
    package reach the log and the screen too.

    Args:
        workdir: an existing directory.
        total_steps: steps of the whole run, those before a resumption included.
        metric: the validation metric shown in the bar; by default the first one reported.
        every: steps from one plain line to the next; by default 50 lines a run.
        console: where to show progress; by default stderr.
    """

    def __init__(
        self,
        workdir: Path | str,
        total_steps: int,
        *,
        metric: str | None = None,
        every: int | None = None,
        console: rich.console.Console | None = None,
    ) -> None:
        self._workdir, self._total, self._metric = Path(workdir), total_steps, metric
        self._every = every or max(1, total_steps // _LINES_PER_RUN)
        self._writes = jax.process_index() == 0
        self._console = console or _Screen(stderr=True)
        self._pace, self._started = _Pace(), time.monotonic()
        self._shown: dict[str, str] = {}
        self._split: str | None = None
        self._bar: rich.progress.Progress | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> 'Monitor':
        if self._writes:
            self._log = self._open.enter_context(_Lines(self._workdir / LOG))
            self._handler = _Handler(self)
            logger = logging.getLogger('adapters_jax')
            # In place of the outer handlers: a message is shown once, above the bar.
            self._outer, logger.handlers = logger.handlers, [self._handler]
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._writes:
            return
        logging.getLogger('adapters_jax').handlers = self._outer
        self._open.close()

    def start(self, step: int = 0) -> None:
        """Begin after `step` steps: what an earlier run recorded of later ones is dropped.

        From step 0, everything recorded before is dropped.
        """
        if not self._writes:
            return
        drop_later_lines(self._workdir / METRICS, step)
        self._metrics = self._open.enter_context(_Lines(self._workdir / METRICS))
        self._events = self._open.enter_context(_Events(self._workdir / TENSORBOARD, step))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _make_bar(self._console)
            self._task = self._bar.add_task('train', total=self._total, completed=step, facts='')
            self._open.enter_context(self._bar)

    def sync(self) -> None:
        """Wait until all metrics are on the disk: they survive the machine, too."""
        if self._writes:
            self._metrics.sync()

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a training step.

        `values` holds numbers by name. Of these 'loss' is shown, and 'examples', the number of
        examples in the step, gives the speed.
        """
        if not self._writes:
            return
        values = files.plain(values)
        self._pace.add(step, values.get('examples', 0))
        self._record(step, TRAIN, values)
        if 'loss' in values:
            self._shown = {'loss': ''} | self._shown | {'loss': _number(values['loss'])}
        facts = self._update_bar(step)
        if step % self._every == 0 or step == self._total:
            self._events.add('train/examples_per_second', self._pace.examples, step)
            self._events.flush()
            share = f'{100 * step // self._total} %'
            self._write(f'step {step:,}/{self._total:,} ({share})  {facts}', self._bar is None)

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Record the metrics of a split after `step` steps; the first split's are shown."""
        if not self._writes:
            return
        values = files.plain(values)
        self._record(step, split, values)
        self._events.flush()
        self._pace.pause()
        self._split = self._split or split
        name = self._metric or next(iter(values), None)
        if split == self._split and name in values:
            self._shown[name] = _number(values[name])
            self._update_bar(step)
        self.message(
            f'step {step:,}: {split} ' + ', '.join(f'{k} {_number(v)}' for k, v in values.items())
        )

    def message(self, text: str) -> None:
        """Show a line, above the bar where there is one, and log it."""
        if self._writes:
            self._write(text, True)

    def _record(self, step: int, split: str, values: dict[str, Any]) -> None:
        self._metrics.append(json.dumps({'step': step, 'split': split, 'values': values}))
        for name, value in values.items():
            if isinstance(value, int | float | str) and _is_number(value):
                self._events.add(f'{split}/{name}', float(value), step)

    def _update_bar(self, step: int) -> str:
        facts = self._facts(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        return facts

    def _facts(self, step: int) -> str:
        facts = [f'{name} {value}' for name, value in self._shown.items()]
        if self._pace.examples:
            facts.append(f'{self._pace.examples:,.0f} examples/s')
        if step >= self._total:
            facts.append(f'in {_duration(time.monotonic() - self._started)}')
        elif self._pace.steps:
            facts.append(f'{_duration((self._total - step) / self._pace.steps)} left')
        return '  '.join(facts)

    def _write(self, text: str, show: bool) -> None:
        self._log.append(time.strftime('%Y-%m-%d %H:%M:%S ') + text)
        if show:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def drop_later_lines(path: Path, step: int) -> None:
    """Leave in a metrics file the whole lines of steps up to `step`; none for step 0.

    What a kill left of a last line is dropped too.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
    kept = [line for line in lines if step and _step_of(line) <= step]
    files.write_text(path, ''.join(line + '\n' for line in kept))


def peak_memory_bytes() -> dict[str, int]:
    """Return the most bytes that this process ever took: of 'host', and of a 'device' if known."""
    peaks = {'host': allocator.peak_bytes()}
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(s.get('peak_bytes_in_use', 0) for s in statistics)
    return peaks | ({'device': device} if device else {})


class _Lines(contextlib.AbstractContextManager):
    """A file that whole lines are appended to, each given to the system at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with files.explained(path):
            self._file = path.open('a+b', buffering=0)
            self._end_last_line()

    def _end_last_line(self) -> None:
        """Begin a new line where a kill or a full disk has cut the last one."""
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read() != b'\n':
                self.append('')

    def append(self, line: str) -> None:
        rest = f'{line}\n'.encode()
        with files.explained(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        with files.explained(self._path):
            os.fsync(self._file.fileno())

    def __exit__(self, *_: Any) -> None:
        self._file.close()


class _Events(contextlib.AbstractContextManager):
    """TensorBoard's file of scalars, from `step` on.

    It is written here and now. tensorboardX's own writer does that in a thread, which dies where
    the disk is full, whereupon the run would wait forever for room in its queue.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._directory = directory
        with files.explained(directory):
            directory.mkdir(exist_ok=True)
            self._file = _writer.EventsWriter(str(directory / 'events'), f'.{os.getpid()}')
            # TensorBoard forgets what earlier files hold of this step and later ones.
            purged = step + 1 if step else 0
            self._write(step=purged, session_log=_protocol.SessionLog(status=_START))

    def _write(self, **what: Any) -> None:
        self._file.write_event(_protocol.Event(wall_time=time.time(), **what))

    def add(self, name: str, value: float, step: int) -> None:
        with files.explained(self._directory):
            self._write(step=step, summary=_summary.scalar(name, value))

    def flush(self) -> None:
        with files.explained(self._directory):
            self._file.flush()

    def __exit__(self, *_: Any) -> None:
        with files.explained(self._directory):
            self._file.close()


class _Screen(rich.console.Console):
    """A terminal, or what stderr goes to; a run outlives it, and goes on unseen."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True


_SHORTEST = 0.1  # seconds from which few steps tell a speed


class _Pace:
    """Speed over the last steps, without pauses, and without the first step's compilation."""

    def __init__(self) -> None:
        self.steps = self.examples = 0.0  # per second
        self._marks: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=_WINDOW)

    def add(self, step: int, examples: int) -> None:
        self._marks.append((time.monotonic(), step, examples))
        (start, first, skipped), (end, last, _) = self._marks[0], self._marks[-1]
        # The last two steps before an evaluation may be marked at one time, which is no speed.
        if end > start and (len(self._marks) > 3 or end - start > _SHORTEST):
            self.steps = (last - first) / (end - start)
            self.examples = (sum(mark[2] for mark in self._marks) - skipped) / (end - start)

    def pause(self) -> None:
        self._marks.clear()


class _Handler(logging.Handler):
    """Hands the package's log records to the monitor; handlers of the root show them already."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(logging.INFO)
        self._monitor = monitor

    def emit(self, record: logging.LogRecord) -> None:
        text = f'{record.levelname.lower()}: {record.getMessage()}'
        # That of a command is there for other libraries, and gets nothing of ours.
        by_root = logging.getLogger('adapters_jax').propagate and logging.getLogger().handlers
        self._monitor._write(text, not by_root)


def _make_bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn('[bold]{task.percentage:>3.0f} %'),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TextColumn('[dim]{task.completed:,.0f}/{task.total:,.0f}'),
        rich.progress.TextColumn(' {task.fields[facts]}', markup=False),
        console=console,
        refresh_per_second=4,
        expand=True,
    )


def _step_of(line: str) -> float:
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return float('inf')


def _is_number(value: int | float | str) -> bool:
    return not isinstance(value, str) or value in ('nan', 'inf', '-inf')


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return f'{value:,}' if isinstance(value, int) else str(value)
    return f'{value:.4f}' if value == 0 or 1e-3 <= abs(value) < 1e4 else f'{value:.2e}'


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02}:{second:02}' if hours else f'{minute}:{second:02}'
