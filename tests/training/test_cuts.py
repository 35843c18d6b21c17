"""A batch in parts is stepped on as at once, and a CPU alone cuts it unasked."""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny

from adapters_jax import entry
from adapters_jax import params as trees
from adapters_jax.adapters.composed import Composed
from adapters_jax.tasks.classification import Classification
from adapters_jax.training import ahead, cuts
from adapters_jax.training import step as steps

TASK = Classification(labels=('a', 'b', 'c'))
METHOD = tiny.Shift(lowest=1)
GOLDENS = Path(__file__).parents[1] / 'goldens'


@functools.cache
def batch():
    """Return 64 rows of unequal numbers of texts, some of them empty."""
    rng = np.random.default_rng(0)
    rows = [list(rng.integers(1, 5, rng.integers(0, 3))) for _ in range(64)]
    return tiny.batch(rows, 8)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with so many devices, on which few tokens are a part."""

    def pretend(devices=1, tokens=1024, backend='cpu'):
        monkeypatch.setattr(cuts, 'TOKENS', tokens)
        monkeypatch.setattr(jax, 'device_count', lambda: devices)
        monkeypatch.setattr(jax, 'default_backend', lambda: backend)

    return pretend


def rows_of(count, length):
    return {'input_ids': np.zeros((count, length), np.int32), 'label': np.zeros((count, 1))}


@pytest.mark.parametrize(
    ('rows', 'length', 'machine_of', 'expected'),
    [
        (32, 128, {}, 4),
        (8, 128, {}, 1),
        (15, 128, {}, 1),  # 1.9 parts
        (18, 128, {}, 2),
        (27, 128, {}, 3),
        (17, 128, {}, 1),  # a prime
        (25, 128, {}, 1),  # 3.1 parts, of which only 5 would be equal
        (32, 128, {'devices': 2}, 4),
        (24, 128, {'devices': 8}, 3),
        (32, 128, {'devices': 16}, 2),
        (32, 128, {'devices': 32}, 1),
        (32, 128, {'backend': 'gpu'}, 1),
        (32, 128, {'backend': 'tpu'}, 1),
    ],
)
def test_how_many_parts_a_batch_is_cut_into(machine, rows, length, machine_of, expected):
    model = tiny.model(METHOD)
    machine(**machine_of)
    assert cuts.automatic(model, rows_of(rows, length)) == expected
    with cuts.fixed(1):
        assert cuts.automatic(model, rows_of(rows, length)) == 1
    assert cuts.automatic(model, rows_of(rows, length)) == expected


def test_what_has_no_tokens_has_the_positions_of_its_backbone(machine):
    machine()
    model = tiny.model(METHOD)
    images = {'pixels': np.zeros((64, 1, 4, 4, 3)), 'label': np.zeros((64, 1))}
    assert cuts.automatic(model, images) == 64 * model.config.positions // 1024
    written = rows_of(32, 96) | {'target_ids': np.zeros((32, 32), np.int32)}
    assert cuts.automatic(model, written) == 4


def test_what_is_not_of_rows_is_not_cut(machine):
    machine()
    blocks = rows_of(32, 128) | {'adapter': np.zeros(8, np.int32)}  # one for four rows on end
    assert cuts.automatic(tiny.model(METHOD), blocks) == 1
    members = {'a': METHOD, 'b': METHOD}
    divided = Composed(expression='batch_split(a, b, batch_sizes=[16, 16])', members=members)
    assert cuts.automatic(tiny.model(divided), rows_of(32, 128)) == 1


def loops(jaxpr):
    """Return how often each loop of a program runs, those inside others too."""
    found = []
    for equation in jaxpr.eqns:
        found += [equation.params['length']] if equation.primitive.name == 'scan' else []
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', value)
            found += loops(inner) if hasattr(inner, 'eqns') else []
    return found


def take_steps(model, **options):
    """Take two steps on one device; return the trainable leaves, the losses, and the loops."""
    optimizer = optax.sgd(0.5)
    trainable, frozen = trees.partition(tiny.params(model), model.rules)
    state, losses = optimizer.init(trainable), []
    step = steps.jit_train_step(
        jax.device_put(trainable), state, model=model, task=TASK, optimizer=optimizer, **options
    )
    rest = frozen, batch(), jax.random.key(0), np.int32(0)
    found = loops(step.trace(trainable, state, *rest).jaxpr)
    for _ in range(2):
        trainable, state, metrics = step(jax.device_put(trainable), state, *rest)
        losses.append(metrics['loss'])
    return trees.flatten(trainable), losses, found


def test_a_step_is_cut_unless_it_is_told_not_to_be(machine):
    machine(tokens=128)
    model = tiny.model(METHOD)
    whole = take_steps(model, dropout=False, accumulate=1)
    asked = take_steps(model, dropout=True, accumulate=4)
    for dropout, wanted in (False, whole), (True, asked):
        found = take_steps(model, dropout=dropout)
        assert found[2] == [4]
        for path, leaf in wanted[0].items():
            np.testing.assert_allclose(found[0][path], leaf, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6)
    assert whole[2] == []


def test_what_is_foretold_for_an_accelerator_is_cut_only_if_asked_for(machine, monkeypatch):
    config = entry.load_config(f'{GOLDENS / "small.py"}:method=pfeiffer')
    one = jax.devices()[:1]
    machine(tokens=64)
    assert loops(ahead.trace_step(ahead.plan(config, one)).jaxpr) == []
    with monkeypatch.context() as patch:
        patch.setattr(cuts, 'fixed', lambda parts: contextlib.nullcontext())
        assert loops(ahead.trace_step(ahead.plan(config, one)).jaxpr)  # a run of one's own
    config.training.accumulate = 2
    assert loops(ahead.trace_step(ahead.plan(config, one)).jaxpr) == [2]
