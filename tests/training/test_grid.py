import json

import pytest

from adapters_jax.adapters import registry
from adapters_jax.config import base, from_json, to_json
from adapters_jax.training import grid


def config(*axes, method='pfeiffer[size=4]', **changes):
    made = base()
    made.method = method
    made.sweep.grid = axes
    for key, value in changes.items():
        made[key] = value
    return made


def test_all_combinations_in_order_with_their_own_configs():
    given = config('optimizer.learning_rate=3e-4,1', 'method.size=8,64', 'seed=0,1', seed=7)
    members = grid.expand(given)
    assert len(members) == 8
    assert members[0].settings == {
        'optimizer.learning_rate': 3e-4,
        'method.size': 8,
        'seed': 0,
    }
    assert [m.name for m in members[:3]] == [
        'learning_rate-3e-4_size-8_seed-0',
        'learning_rate-3e-4_size-8_seed-1',
        'learning_rate-3e-4_size-64_seed-0',
    ]
    last = members[-1].config
    assert (last.optimizer.learning_rate, last.seed, last.method) == (1.0, 1, 'pfeiffer[size=64]')
    # The others see what the sweep was given, and what it was given is as it was.
    assert (given.method, given.seed, given.data.seed) == ('pfeiffer[size=4]', 7, -1)
    # Each is the config of a run: nothing of the grid is left, and it can be written and read.
    assert last.sweep.grid == () and to_json(from_json(to_json(last))) == to_json(last)


def test_texts_in_quotes_keep_their_blanks_and_commas():
    given = config("""task.prefix='translate, please: ',"it's: ",none""", 'seed=0,1')
    prefixes = [member.config.task.prefix for member in grid.expand(given)]
    assert prefixes[::2] == prefixes[1::2] == ['translate, please: ', "it's: ", 'none']
    with pytest.raises(ValueError, match='which has the value "\'x\'" twice'):
        grid.expand(config("task.prefix=x,'x'"))


def test_members_of_different_seeds_see_the_batches_of_the_sweeps_seed():
    seeds = {m.config.data.seed for m in grid.expand(config('seed=1,2', seed=3))}
    assert seeds == {3}
    given = config('seed=1,2')
    given.data.seed = 5
    assert {m.config.data.seed for m in grid.expand(given)} == {5}
    own = grid.expand(config('seed=1,2', 'data.seed=-1,4'))
    assert [m.config.data.seed for m in own] == [-1, 4, -1, 4]
    assert grid.expand(config('optimizer.weight_decay=0,1', seed=3))[0].config.data.seed == -1


@pytest.mark.parametrize(
    ('method', 'key', 'value', 'expected'),
    [
        ('pfeiffer', 'method.reduction_factor', '8', 'pfeiffer[reduction_factor=8]'),
        ('lora[r=4]', 'method.r', '2', 'lora[r=2]'),
        (
            'lora[alpha=4,r=4]|houlsby',
            'method.houlsby.size',
            '2',
            'lora[alpha=4,r=4]|houlsby[size=2]',
        ),
        ('lora', 'method.lora.r', '2', 'lora[r=2]'),
        ('mam', 'method.bottleneck.size', '4', 'mam[bottleneck={size: 4}]'),
        ('pfeiffer', 'method.leave_out', '[0,1]', 'pfeiffer[leave_out=[0,1]]'),
        ('lora', 'method.attn_matrices', '[q]', "lora[attn_matrices=['q']]"),
        ('lora', 'method.rank_pattern', '{query: 2}', 'lora[rank_pattern={query: 2}]'),
        ('houlsby', 'method.scaling', 'learned', 'houlsby[scaling=learned]'),
        ('houlsby', 'method.init_weights_seed', 'None', 'houlsby'),
    ],
)
def test_an_option_of_the_method_is_changed(method, key, value, expected):
    (member,) = grid.expand(config(f'{key}={value}', method=method))
    assert registry.create(member.config.method) == registry.create(expected)


@pytest.mark.parametrize(
    ('axes', 'method', 'expected'),
    [
        ((), 'head', "grid is empty; expected at least one text such as 'seed=0,1,2'"),
        (('seed',), 'head', "holds 'seed'; expected KEY=VALUE,VALUE"),
        (('seed=',), 'head', "holds 'seed='; expected KEY=VALUE"),
        (('=1',), 'head', "holds '=1'; expected KEY=VALUE"),
        (('seed=1,2,1',), 'head', "has the value '1' twice"),
        (('mesh.data=1,2',), 'head', 'numbers would be equal, data-1 and data-2'),
        (
            ('optimizer.learning_rate=1e-3,0.001',),
            'head',
            'numbers would be equal, learning_rate-1e-3 and ',
        ),
        (('method.size.x=1',), 'pfeiffer[size=8]', "leave 'x' out of the key"),
        (('seed=1', 'seed=2'), 'head', "has the key 'seed' twice"),
        (('sede=1',), 'head', "unknown config key sede: no 'sede' here; known: .*seed"),
        (('optimizer.rate=1',), 'head', "no 'rate' here; known: .*learning_rate"),
        (('optimizer.learning_rate.x=1',), 'head', "no 'x' here; known: nothing below it"),
        (('optimizer=1',), 'head', 'optimizer is a group of keys; known: .*learning_rate'),
        (('seed=1.5',), 'head', 'config key seed is 1.5 .*expected int'),
        (('seed=many',), 'head', "config key seed is 'many'; expected int, such as 0"),
        (('sweep.size=1,2',), 'head', 'a key of the sweep itself cannot be swept'),
        (('method=head,full', 'method.size=2'), 'head', "has both 'method' and one of its options"),
        (('method.r=1',), 'lora|houlsby', r'expected method.NAME.OPTION .*names lora, houlsby'),
        (('method.size=?',), 'houlsby', r"'\?' is not a value"),
        (('seed=(1',), 'head', 'brackets .* do not match'),
    ],
)
def test_mistakes_are_named(axes, method, expected):
    with pytest.raises(ValueError, match=expected):
        grid.expand(config(*axes, method=method))


def names(*axes, **options):
    return [member.name for member in grid.expand(config(*axes, **options))]


def test_names_are_folders_and_differ():
    swept = names('backbone=a/b,/a/b', 'data.seed=1', 'seed=2', 'data.train=x y.csv,x,y.csv')
    assert swept[0] == 'backbone-a-b_data-seed-1_seed-2_train-x-y.csv'
    assert len({name.casefold() for name in swept}) == len(swept) == 6
    for name in (*swept, *names('method=' + ','.join('abc'[i] * 300 for i in range(3)))):
        assert len(name) < 200 and not set(name) & set('/,=:* ') and name[0] not in '.-'
    # Equal but for what a name cannot hold, or for what some file systems do not tell apart.
    same = names('data.train=a,A,a/,a"')
    assert len({name.casefold() for name in same}) == 4


def sizes(*axes, size=0, **options):
    return [
        [member.name for member in group]
        for group in grid.populations(grid.expand(config(*axes, **options)), size)
    ]


def test_only_seed_rate_decay_and_sizes_that_can_be_padded_share_a_population():
    free = ('optimizer.learning_rate=1e-3,1e-2', 'optimizer.weight_decay=0,0.1', 'seed=0,1')
    assert len(sizes(*free)) == 1
    assert len(sizes(*free, 'method.size=4,8')) == 1
    for other in (
        'training.epochs=3.0,20.0',
        'training.batch_size=16,32',
        'optimizer.warmup=0.0,0.1',
        'method.dropout=0.0,0.1',
        'data.seed=0,1',
        'method=pfeiffer,houlsby',
    ):
        groups = sizes(*free, other)
        assert [len(group) for group in groups] == [8, 8], other
        assert {g for group in groups for g in group} == set(names(*free, other))


def test_a_population_has_no_more_members_than_allowed():
    groups = sizes('training.epochs=1.0,2.0', 'seed=0,1,2,3,4', size=2)
    assert [len(group) for group in groups] == [2, 2, 1] * 2
    assert groups[1] == ['epochs-1.0_seed-2', 'epochs-1.0_seed-3']


def test_the_settings_of_a_member_are_json():
    (member,) = grid.expand(config('method.leave_out=[0,1]', "task.labels=('a', 'b')"))
    settings = json.loads(json.dumps(member.settings))
    assert settings == {'method.leave_out': [0, 1], 'task.labels': ['a', 'b']}
