import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax import config

DEFAULTS = {'task': 'rte', 'rate': 0.5, 'count': 3, 'flag': False, 'sizes': (1, 2)}


def test_the_base_is_locked_and_fresh():
    one, two = config.base(), config.base()
    one.training.batch_size = 7
    assert two.training.batch_size == 32
    for where in (one, one.training, one.data.columns):
        with pytest.raises(AttributeError):
            where.no_such_key = 1
    with pytest.raises(TypeError):
        one.seed = 'many'


def test_parse_arg_converts_to_the_type_of_the_default():
    text = 'task=mrpc, rate=1,count=-4,flag=True,sizes=(5, 6)'
    parsed = config.parse_arg(text, **DEFAULTS)
    expected = {'task': 'mrpc', 'rate': 1.0, 'count': -4, 'flag': True, 'sizes': (5, 6)}
    assert parsed.to_dict() == expected
    assert isinstance(parsed.rate, float)
    assert config.parse_arg('sizes=[7]', **DEFAULTS).sizes == (7,)
    assert config.parse_arg('rate=1e-4', **DEFAULTS).rate == 1e-4


@pytest.mark.parametrize('nothing', [None, '', ' , '])
def test_parse_arg_without_an_argument_gives_the_defaults(nothing):
    assert config.parse_arg(nothing, **DEFAULTS).to_dict() == DEFAULTS


def test_values_may_hold_commas_inside_brackets_and_equals_signs():
    text = 'method=pfeiffer[reduction_factor=8,leave_out=(0, 1)],task=b'
    parsed = config.parse_arg(text, method='houlsby', task='a')
    assert parsed.method == 'pfeiffer[reduction_factor=8,leave_out=(0, 1)]'
    assert parsed.task == 'b'


@pytest.mark.parametrize('wrong', ['tsak=mrpc', 'mrpc', '=mrpc'])
def test_an_unknown_key_is_named_with_the_known_ones(wrong):
    with pytest.raises(ValueError, match=rf"'{wrong}' is not understood.*task='rte', rate=0.5"):
        config.parse_arg(wrong, **DEFAULTS)


@pytest.mark.parametrize(
    ('wrong', 'expected'),
    [
        ('count=1.5', 'count is 1.5 .*expected int, such as 3'),
        ('count=many', "count is 'many'.*expected int"),
        ('count=True', 'count is True .*expected int'),
        ('rate=True', 'rate is True .*expected float, such as 0.5'),
        ('rate=', "rate is ''.*expected float"),
        ('flag=yes', "flag is 'yes'.*expected bool, such as False"),
        ('flag=1', 'flag is 1 .*expected bool'),
        ('sizes=3', 'sizes is 3 .*expected tuple'),
    ],
)
def test_a_value_of_another_type_is_refused(wrong, expected):
    with pytest.raises(ValueError, match=expected):
        config.parse_arg(wrong, **DEFAULTS)


@given(st.lists(st.sampled_from(['a', 'b=1', 'c[1,2]', 'd={1:(2,3)}', '(,)']), max_size=6))
def test_splitting_undoes_joining(parts):
    assert config.split_outside_brackets(','.join(parts)) == parts
    assert config.split_outside_brackets(' ; '.join(parts), ';') == parts


def test_quoted_values_keep_their_blanks_and_commas():
    text = """a, 'b, (c', "d: ", don't, e = 'f,g', h['i,]', j]"""
    parts = ['a', "'b, (c'", '"d: "', "don't", "e = 'f,g'", "h['i,]', j]"]
    assert config.split_outside_brackets(text) == parts
    made = config.base()
    for value, expected in (
        ("'to German: '", 'to German: '),
        ('"it\'s, "', "it's, "),
        ("a'b'", "a'b'"),
    ):
        assert config.assign(made, 'task.prefix', value) == made.task.prefix == expected
    with pytest.raises(ValueError, match='is not quoted text'):
        config.assign(made, 'task.prefix', "'to German: ")


def test_json_brings_every_key_back():
    changed = config.base()
    changed.seed = 5
    changed.task.labels = ('no', 'yes')
    changed.optimizer.learning_rate = 1 / 3
    changed.data.columns.label = '0'
    text = json.dumps(config.to_json(changed))
    again = config.from_json(json.loads(text))
    assert again.to_dict() == changed.to_dict()
    assert again.to_dict() != config.base().to_dict()
    assert isinstance(again.task.labels, tuple)
    assert again.is_locked


def test_a_part_of_the_keys_leaves_the_others_at_their_defaults():
    again = config.from_json({'training': {'epochs': 2}})
    assert again.training.epochs == 2.0
    assert isinstance(again.training.epochs, float)
    assert again.seed == config.base().seed


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        (
            {'sead': 1, 'x': 2},
            r'unknown config keys sead, x; known here: adapters, .*, seed, .*task, tasks',
        ),
        ({'training': {'epoch': 1}}, r'training\.epoch; known here: accumulate'),
        (
            {'data': {'columns': {'text': 'a'}}},
            r'data\.columns\.text; known here: choices, label, text_a',
        ),
        ({'seed': 'x'}, r"config key seed is 'x' \(str\); expected int, such as 0"),
        ({'seed': True}, r'config key seed is True \(bool\); expected int'),
        ({'seed': None}, r'config key seed is None'),
        ({'seed': {}}, r'config key seed is {}'),
        ({'task': {'labels': ['a', 1]}}, r'task\.labels has the item 1 \(int\); each .* str'),
        (
            {'data': {'split_fractions': [0.5, 'a']}},
            r"data\.split_fractions has the item 'a' \(str\); each .* float, .*0\.1",
        ),
        ({'training': {'remat': 1}}, r'config key training\.remat is 1 .*expected str'),
        ({'training': 3}, r'config key training is 3; expected an object with accumulate'),
        ([], r'the config is \[\]; expected an object with adapters, backbone'),
    ],
)
def test_json_that_is_not_a_config_is_refused(values, expected):
    with pytest.raises(ValueError, match=expected):
        config.from_json(values)


def test_reading_a_workdir(tmp_path):
    path = tmp_path / 'config.json'
    with pytest.raises(FileNotFoundError, match=f'{tmp_path} is not the workdir of a run'):
        config.read(path)
    wanted = config.base()
    wanted.task.positive = 'größer'
    path.write_text(json.dumps(config.to_json(wanted), ensure_ascii=False), 'utf-8')
    assert config.read(path).to_dict() == wanted.to_dict()
    path.write_text('{"seed": 1,')
    with pytest.raises(ValueError, match=f'{path} is not JSON'):
        config.read(path)


def test_decisive_keys_are_those_that_change_numbers():
    one, two = config.base(), config.base()
    assert set(config.NEUTRAL_KEYS).isdisjoint(config.decisive(one))
    # Every neutral key exists: a renamed one would become decisive unnoticed.
    for path in config.NEUTRAL_KEYS:
        section, key = path.split('.')
        assert key in one[section]
    two.training.log_every = 1
    two.mesh.data = 2
    assert config.differences(one, two) == []
    two.optimizer.learning_rate = 0.5
    two.task.labels = ('a',)
    assert sorted(config.differences(one, two)) == [
        'optimizer.learning_rate was 0.001, now 0.5',
        "task.labels was [], now ['a']",
    ]
