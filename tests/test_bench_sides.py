"""The two sides of a race: that each runs by itself, and carries nothing of the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapters_jax import allocator
from adapters_jax.interop.backbones import load_backbone
from experiments.bench import backbones, race, steps, workers

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('job', 'dtype'),
    [(job, 'float32') for job in workers.JOBS] + [('epoch', 'bfloat16'), ('sweep', 'bfloat16')],
)
@pytest.mark.parametrize('side', ['ours', 'theirs'])
def test_every_job_reports_what_is_raced(tmp_path, job, dtype, side):
    rows = [{'text': f'number {i} ?', 'label': f'class {i % 3}'} for i in range(48)]
    data = tmp_path / 'rows.jsonl'
    data.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    settings = {
        'backbone': str(load_backbone('minilm').directory),
        'data': str(data),
        **{'size': 24, 'batch_size': 16, 'members': 4, 'rows': 2, 'tokens': 16},
        'dtype': dtype,
    }
    found = race.report({'job': job, 'side': side, **settings})
    assert found['mebibytes' if job == 'peak_memory' else 'seconds'] > 0
    if job == 'epoch':
        assert found['steps'] > 0 and 0 <= found['padding'] < 1
    if job in ('epoch', 'sweep') and side == 'ours':
        members = settings['members'] if job == 'sweep' else 1
        matrices = 6 * (4 * 384**2 + 2 * 384 * 1536)
        # Forward and backward, without padding; of the last layer only some is computed.
        tokens = 5 * len(rows)
        assert 0.7 < found['flops'] / (members * tokens * 2 * 2 * matrices) < 8
        assert found['product_rate'] > 1e9


@pytest.mark.slow
def test_in_a_sweep_what_is_below_the_adapters_is_computed_once(tmp_path):
    data = tmp_path / 'rows.jsonl'
    data.write_text('\n'.join(f'{{"text": "number {i} ?", "label": "{i % 3}"}}' for i in range(48)))
    job = {'job': 'sweep', 'backbone': str(load_backbone('minilm').directory), 'data': str(data)}
    job |= {'size': 24, 'batch_size': 16, 'members': 4, 'dtype': 'float32'}
    found = [race.report({**job, 'side': 'ours', 'left_out': list(range(n))}) for n in (0, 3)]
    # Of six layers three, forward, once; the others, forward and backward, four times.
    assert 0.5 < found[1]['flops'] / found[0]['flops'] < 0.65
    assert race.report({**job, 'side': 'theirs', 'left_out': [0, 1, 2]})['seconds'] > 0


@pytest.mark.slow
@pytest.mark.parametrize(('mode', 'devices'), [('training', 1), ('inference', 1), ('inference', 2)])
@pytest.mark.parametrize(
    ('method', 'library', 'size'),
    [
        ('double_seq_bn[size=24]', 'adapters', 24),
        ('pfeiffer[size=24]', 'adapters', 24),
        ('lora[r=8]', 'peft', 8),
    ],
)
def test_both_sides_of_a_race_run(tmp_path, mode, devices, method, library, size):
    course = steps.Course('minilm', method, library, size, 4, 16, parts=2, devices=devices)
    told = steps.race(mode, course, 'float32', tmp_path, rounds=2).to_json()
    assert told['ours'] > 0 and told['theirs'] > 0 and 0 < told['share_of_rate'] < 1.5
    assert told['settings']['tokens'] == 16


@pytest.mark.slow
def test_random_weights_are_written_once_and_load(tmp_path, monkeypatch):
    monkeypatch.setitem(backbones.SHAPES, 'base', (1, 64, 128, 2))
    folder = backbones.folder('base', tmp_path)
    assert load_backbone(str(folder)).config.dimensions.hidden == 64
    written = (folder / 'model.safetensors').stat().st_mtime_ns
    assert backbones.folder('base', tmp_path) == folder
    assert (folder / 'model.safetensors').stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="unknown backbone 'huge'; known: minilm, base, large"):
        backbones.folder('huge', tmp_path)


def test_the_public_side_of_a_race_finds_torch_where_our_commands_do_without(monkeypatch):
    monkeypatch.setenv('USE_TORCH', '0')
    assert race.report({'job': 'imports', 'side': 'theirs'})['seconds'] > 0


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='the peak is told by Linux')
@pytest.mark.parametrize(
    'code',
    [
        "from experiments.bench import workers; print(workers._peak_bytes('theirs'))",
        "from adapters_jax.training import monitor; print(monitor.peak_memory_bytes()['host'])",
    ],
)
def test_a_process_does_not_report_the_memory_of_the_one_that_started_it(code):
    held = np.ones(300 * 2**20 // 8)
    told = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT, stdout=subprocess.PIPE, check=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert 2**20 < int(told.stdout) < allocator.peak_bytes() - held.nbytes / 2


def test_their_side_of_a_race_does_not_load_jax():
    code = 'import sys; from experiments.bench import libraries, workers; print(*sys.modules)'
    told = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    assert b'jax' not in told.stdout.split()


def test_compiled_programs_of_the_user_are_no_part_of_a_race(monkeypatch):
    given = {}

    def run(command, env, **_):
        given.update(env)
        return subprocess.CompletedProcess(command, 0, '{"seconds": 1}')

    monkeypatch.setattr(race.subprocess, 'run', run)
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/somewhere')
    monkeypatch.setenv('KEPT', 'yes')
    race.report({'job': 'first_step', 'side': 'ours'})
    assert given['KEPT'] == 'yes' and 'JAX_COMPILATION_CACHE_DIR' not in given


def test_our_side_of_a_race_is_started_as_the_scripts_start_it():
    scripts = (ROOT / 'launch' / 'environment.sh').read_text()
    for name, value in race.LAUNCHED.items():
        assert f'export {name}=${{{name}:-{value}}}' in scripts
