"""What a run leaves on disk and shows."""

import errno
import io
import itertools
import json
import logging
import os
import struct

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import rich.console
from full_disk import file_size
from tensorboardX.proto import event_pb2

from adapters_jax import files
from adapters_jax.training import monitor
from adapters_jax.training.monitor import Monitor


def screen(terminal):
    return rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=110)


def open_monitor(workdir, total=100, terminal=False, **options):
    return Monitor(workdir, total, console=screen(terminal), **options)


def lines(workdir):
    text = (workdir / monitor.METRICS).read_text()

    def refuse(name):
        raise AssertionError(f'{name} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(workdir):
    """Return (tag, step, value) of all scalars in the event files, and the steps of restarts."""
    scalars, restarts = [], []
    for path in sorted((workdir / monitor.TENSORBOARD).iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from('<Q', data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField('session_log'):
                restarts.append(event.step)
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return scalars, restarts


def test_everything_is_recorded(tmp_path):
    with open_monitor(tmp_path) as run:
        run.message('110 parameters')
        run.start()
        run.train(1, {'loss': np.float32(0.5), 'examples': np.int64(32)})
        run.train(2, {'loss': 0.25, 'examples': 32})
        run.evaluation(2, 'validation', {'accuracy': 0.75, 'confusion': np.eye(2)})
        # Given to the system at once: a kill loses none of it.
        recorded = lines(tmp_path)
    assert recorded == [
        {'step': 1, 'split': 'train', 'values': {'loss': 0.5, 'examples': 32}},
        {'step': 2, 'split': 'train', 'values': {'loss': 0.25, 'examples': 32}},
        {
            'step': 2,
            'split': 'validation',
            'values': {'accuracy': 0.75, 'confusion': [[1.0, 0.0], [0.0, 1.0]]},
        },
    ]
    scalars, _ = events(tmp_path)
    assert ('train/loss', 1, 0.5) in scalars
    assert ('train/loss', 2, 0.25) in scalars
    assert ('validation/accuracy', 2, 0.75) in scalars
    log = (tmp_path / monitor.LOG).read_text()
    assert '110 parameters\n' in log
    assert 'step 2: validation accuracy 0.7500' in log


def test_what_json_does_not_have(tmp_path):
    with open_monitor(tmp_path) as run:
        run.start()
        run.train(1, {'loss': jax.numpy.nan, 'norm': np.float32('inf'), 'low': -float('inf')})
    assert lines(tmp_path)[0]['values'] == {'loss': 'nan', 'norm': 'inf', 'low': '-inf'}
    scalars = {tag: value for tag, _, value in events(tmp_path)[0]}
    assert np.isnan(scalars['train/loss'])
    assert scalars['train/low'] == -np.inf


def test_a_resumed_run_leaves_the_same_metrics(tmp_path):
    def steps(run, first, last):
        for step in range(first, last + 1):
            run.train(step, {'loss': 1 / step, 'examples': 8})
            if step % 5 == 0:
                run.evaluation(step, 'validation', {'accuracy': step / 100})

    calm, killed = tmp_path / 'calm', tmp_path / 'killed'
    for workdir, bounds in ((calm, [(1, 20)]), (killed, [(1, 13), (11, 17), (11, 20)])):
        workdir.mkdir()
        for first, last in bounds:
            with open_monitor(workdir, 20) as run:
                run.start(first - 1)
                steps(run, first, last)
            with (workdir / monitor.METRICS).open('a') as file:
                file.write('{"step": 3, "split": "tr' if last < 20 else '')
    metrics = [(workdir / monitor.METRICS).read_bytes() for workdir in (calm, killed)]
    assert metrics[0] == metrics[1]
    # TensorBoard hides what came after the step that a later session starts from.
    assert events(killed)[1][-1] == 11


@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    steps=st.lists(st.integers(1, 9), max_size=9),
    cut=st.integers(0, 40),
    step=st.integers(0, 10),
)
def test_dropping_keeps_whole_lines_up_to_the_step(tmp_path, steps, cut, step):
    whole = [json.dumps({'step': s, 'split': 'train', 'values': {'ü': s}}) for s in sorted(steps)]
    content = ''.join(line + '\n' for line in whole).encode()
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(content[: max(len(content) - cut, 0)])
    left = [line for line in path.read_text(errors='replace').split('\n') if line in whole]
    monitor.drop_later_lines(path, step)
    expected = [line for line in left if step and json.loads(line)['step'] <= step]
    assert path.read_text() == ''.join(line + '\n' for line in expected)


def test_a_new_start_drops_everything(tmp_path):
    for _ in range(2):
        with open_monitor(tmp_path) as run:
            run.start()
            run.evaluation(0, 'validation', {'accuracy': 0.5})
    assert len(lines(tmp_path)) == 1


def test_plain_lines_off_the_terminal(tmp_path):
    with open_monitor(tmp_path, 10, every=4) as run:
        run.start()
        for step in range(1, 11):
            run.train(step, {'loss': step / 8, 'examples': 32})
        shown = run._console.file.getvalue().splitlines()
    assert [line.split('  ')[:2] for line in shown] == [
        ['step 4/10 (40 %)', 'loss 0.5000'],
        ['step 8/10 (80 %)', 'loss 1.0000'],
        ['step 10/10 (100 %)', 'loss 1.2500'],
    ]
    assert all('examples/s' in line for line in shown)
    assert ' left' in shown[0]
    assert '\x1b' not in run._console.file.getvalue()


def test_long_lines_are_not_broken(tmp_path):
    with open_monitor(tmp_path) as run:
        run.message('word ' * 100 + '[bold]kept[/bold]')
    assert run._console.file.getvalue() == 'word ' * 100 + '[bold]kept[/bold]\n'


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(monitor.time, 'monotonic', lambda: float(next(clock)))
    with open_monitor(tmp_path, 200, terminal=True) as run:
        run.start(100)
        run.train(101, {'loss': 0.5, 'examples': 32})
        run.train(150, {'loss': 0.25, 'examples': 32})
        run.evaluation(150, 'validation', {'accuracy': 0.875, 'f1': 0.5})
        run.evaluation(150, 'other split', {'accuracy': 0.1})
    shown = run._console.file.getvalue()
    assert 'step 150: validation accuracy 0.8750, f1 0.5000' in shown
    last = shown[shown.rindex('%') :]
    assert '150/200' in last
    assert 'loss 0.2500  accuracy 0.8750' in last
    assert ' 75 ' in shown
    assert 'examples/s' in last
    assert ' left' in last


def test_the_metric_to_show_may_be_named(tmp_path):
    with open_monitor(tmp_path, metric='f1', every=1) as run:
        run.start()
        run.evaluation(1, 'validation', {'accuracy': 0.875, 'f1': 0.5})
        run.train(2, {'loss': 1.0})
    assert 'loss 1.0000  f1 0.5000' in run._console.file.getvalue()


def test_speed_leaves_out_pauses(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitor.time, 'monotonic', lambda: clock[0])
    with open_monitor(tmp_path, 1000, every=1) as run:
        run.start()
        for step, seconds in ((1, 60.0), (2, 0.5), (3, 0.5)):  # the first step compiles
            clock[0] += seconds
            run.train(step, {'examples': 16})
        run.evaluation(3, 'validation', {'accuracy': 0.5})
        clock[0] += 100
        run.train(4, {'examples': 16})
        clock[0] += 0.25
        run.train(5, {'examples': 16})
    shown = run._console.file.getvalue().splitlines()
    assert '32 examples/s  8:18 left' in shown[2]
    assert '32 examples/s  8:18 left' in shown[4]
    assert '64 examples/s  4:09 left' in shown[5]


def test_steps_that_are_told_of_at_once_are_no_speed(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(monitor.time, 'monotonic', lambda: clock[0])
    with open_monitor(tmp_path, 1000, every=1) as run:
        run.start()
        for step, seconds in ((1, 60.0), (2, 0.009)):
            clock[0] += seconds
            run.train(step, {'examples': 16})
    assert 'examples/s' not in run._console.file.getvalue()


def test_warnings_of_the_package_are_logged(tmp_path):
    with open_monitor(tmp_path):
        logging.getLogger('adapters_jax.training.manifest').warning('step %d is damaged', 7)
    logging.getLogger('adapters_jax').warning('nobody listens')
    log = (tmp_path / monitor.LOG).read_text()
    assert 'warning: step 7 is damaged\n' in log
    assert 'nobody' not in log


@pytest.mark.parametrize('alone', [True, False])
def test_warnings_are_shown_unless_a_handler_of_the_root_shows_them(tmp_path, monkeypatch, alone):
    """A command's root has one, which our records do not reach."""
    assert logging.getLogger().handlers
    monkeypatch.setattr(logging.getLogger('adapters_jax'), 'propagate', not alone)
    with open_monitor(tmp_path) as run:
        logging.getLogger('adapters_jax.training.manifest').warning('step %d is damaged', 7)
    assert ('warning: step 7 is damaged\n' in run._console.file.getvalue()) == alone


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    with open_monitor(tmp_path) as run:
        run.start()
        run.train(1, {'loss': 1.0})
        run.evaluation(1, 'validation', {'accuracy': 1.0})
        run.message('hello')
    assert list(tmp_path.iterdir()) == []
    assert run._console.file.getvalue() == ''


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    (tmp_path / monitor.LOG).symlink_to('/dev/full')
    with (
        pytest.raises(files.DiskError, match=r'no room to write .*log.txt .*free some space'),
        open_monitor(tmp_path) as run,
    ):
        run.message('hello')


def test_a_disk_that_fills_up_under_tensorboard_ends_the_run(tmp_path):
    """It did not: a thread died of it, and the run waited for that thread forever."""
    with (
        pytest.raises(files.DiskError, match=r'no room to write .*tensorboard .*free some space'),
        open_monitor(tmp_path, 10**6) as run,
        file_size(3000),
    ):
        run.start()
        run._metrics.append = lambda line: None  # that file would be full first
        for step in range(1, 1000):
            run.train(step, {'loss': 1.0, 'norm': 2.0, 'rate': 3.0})


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path):
    (tmp_path / monitor.LOG).write_text('whole\n2026-01-01 this was wr')
    with open_monitor(tmp_path) as run:
        run.message('hello')
    first, cut, line = (tmp_path / monitor.LOG).read_text().splitlines()
    assert (first, cut) == ('whole', '2026-01-01 this was wr') and line.endswith(' hello')


@pytest.mark.parametrize('code', [errno.EPIPE, errno.EIO])
def test_a_screen_that_is_gone_ends_nothing(tmp_path, code):
    """As with `train 2>&1 | head`, or after the terminal was closed."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(code, os.strerror(code))

        flush = write

    with Monitor(tmp_path, 10, console=monitor._Screen(file=Gone())) as run:
        run.start()
        for step in (1, 2):
            run.train(step, {'loss': 0.5})
            run.message('seen by nobody')
    assert len(lines(tmp_path)) == 2
    assert (tmp_path / monitor.LOG).read_text().count('seen by nobody') == 2


def test_peak_memory():
    held = np.ones(4_000_000)
    peaks = monitor.peak_memory_bytes()
    assert held.nbytes < peaks['host'] < 1e12
    assert 'device' not in peaks or peaks['device'] > 0


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0.4, '0:00'), (59.6, '1:00'), (3599, '59:59'), (36610, '10:10:10')]
)
def test_durations(seconds, text):
    assert monitor._duration(seconds) == text


@pytest.mark.parametrize(
    ('value', 'text'),
    [(0.5, '0.5000'), (0.0, '0.0000'), (1e-5, '1.00e-05'), (123456, '123,456'), ('nan', 'nan')],
)
def test_numbers(value, text):
    assert monitor._number(value) == text
