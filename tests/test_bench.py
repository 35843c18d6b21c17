"""The race against the libraries: what is counted, what is told, and that nothing is lost."""

import collections
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from adapters_jax import sharding
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models.heads import HeadConfig
from adapters_jax.training import cutting
from adapters_jax.training.flops import product_flops
from experiments.bench import __main__ as bench
from experiments.bench import (
    chart,
    kernels,
    libraries,
    mixed_adapters,
    parts,
    population,
    programs,
    sizes,
    whole_runs,
    workers,
)
from experiments.bench.race import Race
from experiments.bench.timing import Times, compare

ROOT = Path(__file__).parents[1]


def flops(function, *arguments):
    return product_flops(jax.jit(function).trace(*arguments).jaxpr)


def test_the_arithmetic_of_products_is_counted_wherever_they_stand():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    once = 2 * 3 * 5 * 7
    assert flops(jnp.matmul, a, b) == once
    assert flops(lambda a, b: jnp.tanh(jax.jit(jnp.matmul)(a, b)) + 1, a, b) == once
    assert flops(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(4)), a, b) == 4 * once
    assert flops(lambda a, b: jax.checkpoint(jnp.matmul)(a, b), a, b) == once
    total = jax.grad(lambda a, b: jnp.square(a @ b).sum(), (0, 1))
    assert flops(total, a, b) == 3 * once
    batched = jnp.ones((2, 3, 5)), jnp.ones((2, 7, 5))
    assert flops(lambda x, y: jnp.einsum('bij,bkj->bik', x, y), *batched) == 2 * once
    assert flops(lambda a, b: a.sum() + b.sum(), a, b) == 0


def test_the_arithmetic_of_all_devices_is_counted():
    mesh = sharding.make_mesh(2)
    rows = jax.sharding.PartitionSpec('data')
    whole = jax.sharding.PartitionSpec()
    own = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops(own, jnp.ones((4, 5)), jnp.ones((5, 7))) == 2 * 4 * 5 * 7


def test_a_forward_pass_has_the_arithmetic_of_a_transformer(tmp_path):
    layers = 4
    loaded = load_backbone(toy.write_backbone(tmp_path / 'bert', layers=layers, hidden=32))
    rows, tokens, hidden, inner, heads = 3, 16, 32, 64, loaded.config.block.heads
    batch = programs.random_batch(rows, tokens, loaded.config.vocabulary)
    model, params = programs.make(loaded, 'head')
    found = programs.inference(model, params, batch)
    dense = 2 * rows * tokens * (4 * hidden**2 + 2 * hidden * inner)
    attention = 2 * 2 * rows * tokens**2 * hidden
    # Of the last layer what the first tokens need: not even the keys and values of the others.
    last = 2 * rows * (4 * hidden**2 + 2 * hidden * inner)
    last += 2 * 2 * rows * tokens * heads * hidden
    head = 2 * rows * (hidden**2 + 2 * hidden)
    assert found.flops == (layers - 1) * (dense + attention) + last + head
    assert np.isfinite(found.call()).all()
    trained = programs.training(*programs.make(loaded, 'pfeiffer[size=4]'), batch)
    assert trained.flops > 1.5 * found.flops  # what is below the adapter of layer 0 has no gradient
    losses = [float(trained.call()['loss']) for _ in range(3)]  # the first rate is 0
    assert losses[2] != losses[0]


def test_a_profile_sums_kernels_of_one_name_on_the_devices_streams():
    def thread(tid, name):
        return {'ph': 'M', 'pid': 1, 'tid': tid, 'name': 'thread_name', 'args': {'name': name}}

    def ran(tid, name, dur):
        return {'ph': 'X', 'pid': 1, 'tid': tid, 'name': name, 'dur': dur}

    events = [thread(7, 'Stream #14(Compute)'), thread(8, 'python3'), ran(8, 'waiting', 900)]
    events += [ran(7, 'fusion', 30), ran(7, 'gemm', 50), ran(7, 'fusion', 40)]
    found = kernels.of_streams(events)
    assert found == [('fusion', 2, 70), ('gemm', 1, 50)]
    title, whole, _, first, _ = kernels.render(found, 2, 'a step').splitlines()
    assert title == 'a step' and whole == '60 us of kernels a call'
    assert first.split() == ['35.0', 'us', '1.0', 'x', 'fusion']


def test_a_profile_of_a_processor_tells_the_places_of_a_model(tmp_path):
    loaded = load_backbone(toy.write_backbone(tmp_path / 'bert', layers=2, hidden=32))
    batch = programs.random_batch(2, 16, loaded.config.vocabulary)
    program = programs.training(*programs.make(loaded, 'pfeiffer[size=4]'), batch)
    jax.block_until_ready(program.call())
    started = time.perf_counter()
    events = kernels.trace(program.call, 3)
    whole = 1e6 * (time.perf_counter() - started)
    found = kernels.of_instructions(events, program.text)
    assert 0 < sum(spent for _, _, spent in found) < whole
    runs = collections.Counter()
    for name, launches, _ in found:
        runs[name.rpartition('  ')[2]] += launches
    layers = loaded.config.layers
    # The last one has no values: first tokens are all that is read.
    assert runs['forward/layer/attention/value/dot_general'] == 3 * (layers - 1)
    assert runs['forward/layer/attention/output/dot_general'] == 3 * layers
    assert runs['backward/layer/attention/output/dot_general'] == 3 * (layers - 1)


def times(*seconds):
    return Times(tuple(map(float, seconds)))


RACE = Race('toy', times(1, 2, 4), times(3, 4, 4), {'rows': 2}, more={'share_of_rate': 0.5})


def test_a_race_tells_the_ratio_of_each_round():
    told = RACE.to_json()
    assert (told['ours'], told['theirs'], told['ratio']) == (2, 4, 2)
    assert told['spread'] == [1.5, 2.5]
    assert told['rounds'] == {'ours': [1, 2, 4], 'theirs': [3, 4, 4]}
    assert told['settings'] == {'rows': 2} and told['share_of_rate'] == 0.5


def test_races_run_before_stay_in_the_report(tmp_path, monkeypatch, capsys):
    def runner(*_):
        return [RACE, Race('other', times(2), times(1), {}, unit='MiB')]

    monkeypatch.setattr(bench, 'RACES', {'train_step': runner, 'memory': runner})
    for only in ('memory', 'train_step'):
        bench.main(str(tmp_path), [only], rounds=1, data='', examples=32)
    told = json.loads((tmp_path / 'bench.json').read_text())
    assert list(told) == ['train_step', 'memory']
    table = (tmp_path / 'bench.md').read_text()
    assert '| `train_step` | toy | 2.000 s | 4.000 s | 2.00 (1.50 to 2.50) | 50 % |' in table
    assert '| `memory` | other | 2 MiB | 1 MiB | 0.50 |  |' in table
    assert (tmp_path / 'bench.png').read_bytes().startswith(b'\x89PNG')
    assert table in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown race 'sprint'; known: train_step, memory"):
        bench.main(str(tmp_path), ['sprint'], rounds=1, data='', examples=32)


def test_rows_before_a_failure_are_kept(tmp_path, monkeypatch):
    def runner(*_):
        yield RACE
        raise RuntimeError('the machine is gone')

    monkeypatch.setattr(bench, 'RACES', {'inference': runner})
    with pytest.raises(RuntimeError, match='the machine is gone'):
        bench.main(str(tmp_path), ['inference'], rounds=1, data='', examples=32)
    told = json.loads((tmp_path / 'bench.json').read_text())
    assert told['inference']['title'] == 'toy' and told['inference']['more'] == []


def provenance(commit, **versions):
    shown = {'jax': '1', 'adapters': '2', 'peft': '3', 'torch': '4+cpu', 'transformers': '5'}
    return {'hardware': 'a machine', 'versions': shown | versions, 'commit': commit}


def test_a_race_keeps_the_commit_and_the_libraries_that_it_was_run_with(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'RACES', {name: lambda *_: [RACE] for name in ('epoch', 'sweep')})
    for only, commit in (('epoch', 'a' * 12), ('sweep', 'b' * 12 + '+')):
        monkeypatch.setattr(libraries, 'describe', lambda commit=commit: provenance(commit))
        bench.main(str(tmp_path), [only], rounds=3, data='', examples=32)
    told = json.loads((tmp_path / 'bench.json').read_text())
    assert [told[name]['commit'] for name in ('epoch', 'sweep')] == ['a' * 12, 'b' * 12 + '+']
    table = (tmp_path / 'bench.md').read_text()
    assert 'with jax 1 against adapters 2, peft 3, torch 4, transformers 5' in table
    assert table.endswith(
        '- `--only=epoch --rounds=3` at `aaaaaaa`\n- `--only=sweep --rounds=3` at `bbbbbbb+`\n'
    )
    del told['sweep']['commit']
    (tmp_path / 'bench.json').write_text(json.dumps(told))
    with pytest.raises(
        ValueError, match=r"race 'sweep' lacks commit; expected .* another --output"
    ):
        bench.main(str(tmp_path), ['epoch'], rounds=3, data='', examples=32)


def test_a_library_that_is_not_there_is_told_with_what_brings_it(monkeypatch):
    monkeypatch.setattr(libraries, 'RACED', ('adapters', 'no-such-library'))
    with pytest.raises(ValueError, match=r'no-such-library is not installed.*requirements-test'):
        libraries.describe()


def test_races_with_other_libraries_are_told_apart():
    one, other = provenance('a' * 12), provenance('a' * 12, torch='9')
    result = {'epoch': bench.collect([RACE], one), 'sweep': bench.collect([RACE], other)}
    told = bench.render(result)
    assert told.index('torch 4') < told.index('only=epoch') < told.index('torch 9')
    assert told.index('torch 9') < told.index('only=sweep')


def test_what_is_said_of_a_race_is_said_of_its_machine_and_kind():
    cpu = {**provenance('a' * 12), 'hardware': '2 cores of x'}
    gpu = provenance('b' * 12)
    quick = Race('quick', times(0.0105), times(0.02), {})
    told = bench.render({'inference': bench.collect([quick], gpu)})
    assert '| 10.50 ms | 20.00 ms |' in told
    assert 'bfloat16' in told and 'GLIBC_TUNABLES' not in told and 'trainer' not in told
    told = bench.render({'epoch': bench.collect([RACE], cpu)})
    assert 'GLIBC_TUNABLES' in told and 'trainer' in told and 'bfloat16' not in told


def test_the_versions_of_the_raced_libraries_are_told():
    found = libraries.describe()
    assert {'jax', *libraries.RACED} <= found['versions'].keys()
    assert found['versions']['peft'][0].isdigit() and found['commit'] and found['hardware']


def of_workers(monkeypatch):
    """Let no process be started; return the jobs that were asked for."""
    asked = []

    def run(jobs, rounds, field):
        asked.extend(jobs.values())
        found = {'seconds': 2.0, 'flops': 3e9, 'product_rate': 6e9}
        return {name: times(*[1] * rounds) for name in jobs}, dict.fromkeys(jobs, found)

    monkeypatch.setattr(whole_runs, 'of_processes', run)
    return asked


def test_an_epoch_says_how_many_examples_of_what(tmp_path, monkeypatch):
    jobs = of_workers(monkeypatch)
    folder = tmp_path / 'somewhere'
    written = {'TREC': tmp_path / 'trec.jsonl', 'RTE': tmp_path / 'rte.jsonl'}
    monkeypatch.setattr(whole_runs, '_texts', lambda *_: written)
    runs = {
        'epoch': whole_runs.epoch(tmp_path, 5, str(folder), 800),
        'sweep': whole_runs.sweep(tmp_path, 5, str(folder), 800),
    }
    result = {name: bench.collect(run, provenance('a' * 12)) for name, run in runs.items()}
    trec, rte = result['epoch'], result['epoch']['more'][0]
    assert [row['settings']['source'] for row in (trec, rte)] == ['built in', 'GLUE']
    alone, (spread, upper, upper_spread) = result['sweep'], result['sweep']['more']
    assert upper['title'] == alone['title'] + ', adapters in the upper half'
    for one, two in ((alone, spread), (upper, upper_spread)):
        assert two['title'] == one['title'] + ' over 2 devices'
        assert [row['settings']['devices'] for row in (one, two)] == [1, 2]
    left_out = [row['settings']['left_out'] for row in (alone, spread, upper, upper_spread)]
    assert left_out == [(), (), (0, 1, 2), (0, 1, 2)]
    of_sweep = [(job.get('devices', 1), len(job['left_out'])) for job in jobs if 'members' in job]
    assert of_sweep == [(1, 0), (1, 0), (2, 0), (1, 3), (1, 3), (2, 3)]
    for row in (trec, rte, alone, spread, upper, upper_spread):
        assert row['settings']['examples'] == 800 and row['settings']['dtype'] == 'float32'
        assert row['share_of_rate'] == 0.25 and row['last']['ours']['flops'] == 3e9
    assert {job['dtype'] for job in jobs} == {'float32'} and 'examples' not in jobs[0]
    told = bench.render(result)
    assert '`--only=epoch --examples=800 --data=GLUE`' in told
    assert '`--only=sweep --examples=800`' in told and str(tmp_path) not in told


def test_an_epoch_is_in_bfloat16_where_the_course_is():
    course = {'backbone': 'minilm', 'data': 'x', 'size': 24, 'batch_size': 32}
    for dtype in ('float32', 'bfloat16'):
        assert workers._config(**course, dtype=dtype, started=0.0).training.dtype == dtype


def test_padding_is_that_of_the_batch():
    batch = programs.random_batch(4, 8, 100)
    assert programs.padding(batch) == 0
    batch['segments'][:, 6:] = 0
    assert programs.padding(batch) == 0.25


def test_every_race_says_what_it_was_run_with(monkeypatch, tmp_path):
    of_workers(monkeypatch)
    *_, alone = whole_runs.first_step(tmp_path, 1)
    assert alone.settings == {'imports': {'ours': 'adapters_jax.train', 'theirs': 'adapters'}}
    monkeypatch.setattr(mixed_adapters, 'ours', lambda *_: {'mixed forward': lambda: 0})
    monkeypatch.setattr(
        mixed_adapters, 'theirs', lambda *_: {f'{x} mixed': lambda: 0 for x in libraries.RACED}
    )
    for mixed in mixed_adapters.races(1):
        assert mixed.settings['backbone'] == 'minilm' and mixed.settings['dtype'] == 'float32'


def test_files_are_compared_with_all_that_is_in_a_folder(tmp_path):
    (tmp_path / 'below').mkdir()
    (tmp_path / 'one').write_bytes(bytes(1500))
    (tmp_path / 'below' / 'other').write_bytes(bytes(700))
    assert sizes.bytes_of(tmp_path) == {'below/other': 700, 'one': 1500}
    course = ('minilm', *sizes.COURSES[1])
    told = sizes.race(*course, tmp_path).to_json()
    assert told['unit'] == 'kB' and told['ours'] == sum(told['files']['ours'].values()) / 1000
    assert told['theirs'] == sum(told['files']['theirs'].values()) / 1000
    # What both hold is float32, and little besides.
    for side in ('ours', 'theirs'):
        assert 1 < 1000 * told[side] / (4 * told['settings']['parameters']) < 1.05
    with pytest.raises(RuntimeError, match=r'[\d,]+ parameters of ours and [\d,]+ of adapters'):
        sizes.race(*course[:-1], HeadConfig(), tmp_path)


def test_the_stored_races_are_whole_and_each_has_its_bar():
    stored = bench.read(chart.STORED)
    assert list(stored) == list(bench.RACES)
    rows = [row for first in stored.values() for row in (first, *first['more'])]
    assert all(row['settings'] for row in rows)
    axes = chart.figure(stored).axes[0]
    assert len(axes.patches) == len(rows)
    assert [bar.get_width() for bar in axes.patches] == [row['ratio'] for row in rows]
    assert chart.STORED.with_suffix('.png').exists()


def test_a_program_over_two_devices_does_the_same(tmp_path):
    loaded = load_backbone(toy.write_backbone(tmp_path / 'bert', layers=2, hidden=32))
    batch = programs.random_batch(4, 16, loaded.config.vocabulary)
    made = programs.make(loaded, 'pfeiffer[size=4]')
    one, two = (programs.inference(*made, batch, devices=n) for n in (1, 2))
    assert one.flops == two.flops and one.temporary > two.temporary
    np.testing.assert_allclose(one.call(), two.call(), atol=1e-6)
    one, two = (programs.training(*made, batch, devices=n) for n in (1, 2))
    losses = [[float(program.call()['loss']) for _ in range(3)] for program in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_pause_is_no_part_of_a_measurement():
    found = compare({'nothing': lambda: None}, repeats=2, pause=0.05)
    assert found['nothing'].median < 0.01


def test_the_race_says_what_each_side_does_by_itself():
    cpu = {**provenance('a' * 12), 'hardware': '2 cores of x'}
    told = bench.render({'sweep': bench.collect([RACE], cpu)})
    for named in ('eager', '`group_by_length`', '`GLIBC_TUNABLES`', '`mallopt`'):
        assert named in told
    page = (ROOT / 'docs' / 'results.md').read_text('utf-8')
    assert 'theirs is eager' in page


def test_the_command_below_the_table_of_mixed_adapters_is_that_of_its_rows():
    stored = json.loads((chart.STORED.parent / 'mixed_adapters.json').read_text())
    lengths = ','.join(dict.fromkeys(str(row['length']) for row in stored['rows']))
    told = mixed_adapters.render(stored)
    assert f'--output=DIR --lengths={lengths} --repeats={stored["repeats"]}`' in told


def test_whole_commands_say_that_the_sweep_has_the_trunk_cached():
    stored = json.loads((chart.STORED.parent / 'population.json').read_text())
    told = population.render(stored)
    assert '| 1 x `sweep`, trunk cached |' in told and 'Whole commands were run once' in told
    assert 'run once' not in population.render(stored | {'commands': []})


def test_a_command_that_fails_in_a_race_is_told_with_what_it_said():
    with pytest.raises(
        RuntimeError, match=r'`.*adapters_jax.train.*` ended with \d+:\n(.|\n)*error: '
    ):
        population.run('train', '--config=configs/quickstart.py', '--config.no_such_key=1')


def test_parts_of_a_batch_are_raced_with_the_whole(tmp_path, monkeypatch):
    weights = toy.write_backbone(tmp_path / 'bert', layers=2, hidden=32)
    monkeypatch.setattr(
        parts, 'COURSES', (('training', 'toy', 'lora[r=2]', 16), ('inference', 'toy', 'head', 16))
    )
    monkeypatch.setattr(parts, 'PARTS', (1, 2))
    monkeypatch.setattr(parts, 'TOKENS', 16)
    monkeypatch.setattr(parts.backbones, 'folder', lambda name, root: weights)
    monkeypatch.setattr(cutting, 'PART', 128)
    parts.main(str(tmp_path / 'out'), rounds=1)
    result = json.loads((tmp_path / 'out/parts.json').read_text())
    assert [course['automatic'] for course in result['courses']] == [2, 2]
    for course in result['courses']:
        assert 0 < course['temporary']['2'] < course['temporary']['1']
    step, forward = (tmp_path / 'out/parts.md').read_text().splitlines()[2:4]
    assert step.startswith('| step, `lora[r=2]` on toy | 256 | ') and step.count('**') == 2
    assert forward.startswith('| forward pass, `head` on toy | 256 | ')
