"""A run that is killed at any moment ends with the bits of one that nothing disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name('toy_run.py')


class Toy:
    """The toy run, in a process that can be killed."""

    def __init__(self, directory, steps, size, pause):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.arguments = [sys.executable, TOY, directory, str(steps), str(size), str(pause)]

    def start(self):
        environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
        return subprocess.Popen(self.arguments, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self, process=None):
        process = process or self.start()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    def kill(self, moment):
        """Run until `moment()` is true, and kill; tell whether the kill came before the end."""
        process = self.start()
        while not moment() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        return process.returncode == -signal.SIGKILL

    def lines(self):
        path = self.directory / 'batches.txt'
        return path.read_text().splitlines() if path.exists() else []

    def after(self, steps):
        """Return a moment: `steps` more steps have been taken."""
        aim = len(self.lines()) + steps
        return lambda: len(self.lines()) >= aim

    def while_writing(self):
        """Return a moment: a checkpoint is being written, and another is there."""
        checkpoints = self.directory / 'checkpoints'

        def writing():
            names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
            return any('tmp' in n for n in names) and any(n.isdecimal() for n in names)

        return writing

    def batches(self):
        """Return the batch of each step, after checking that a step taken twice saw it twice."""
        seen = {}
        for step, batch in (line.split() for line in self.lines()):
            assert seen.setdefault(int(step), batch) == batch, f'step {step} saw another batch'
        return seen

    def final(self):
        return (self.directory / 'final.txt').read_text()


def check_kills(tmp_path, steps, size, pause, kills):
    """Kill a run at the moments that `kills` names; compare it with one that nothing disturbed."""
    calm = Toy(tmp_path / 'calm', steps, size, 0)
    beside = calm.start()
    toy = Toy(tmp_path / 'killed', steps, size, pause)
    for kill in kills:
        moment = toy.while_writing() if kill == 'writing' else toy.after(kill)
        assert toy.kill(moment)
        if kill == 'writing':
            left = [p.name for p in (toy.directory / 'checkpoints').iterdir() if 'tmp' in p.name]
            assert left, 'the kill did not come during a write'
    toy.finish()
    calm.finish(beside)
    assert len(toy.lines()) > steps, 'no step was taken twice: nothing was lost by the kills'
    assert toy.batches() == calm.batches()
    assert toy.final() == calm.final()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    check_kills(tmp_path, 16, 500_000, 0.02, [random.randint(4, 9), 'writing'])


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    kills = [random.choice(['writing', random.randint(1, 9)]) for _ in range(20)]
    check_kills(tmp_path, 150, 1_000_000, 0.04, kills)
