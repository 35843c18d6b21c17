"""Members of a population against the same runs done alone."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adapters_jax import params as trees
from adapters_jax import sharding, tasks
from adapters_jax.adapters import bank, registry
from adapters_jax.models.heads import HeadConfig
from adapters_jax.training import population
from adapters_jax.training import step as steps
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer
from adapters_jax.training.population import State, Traits

TASK = tasks.Classification(labels=('a', 'b', 'c'))
STEPS = 50
OPTIMIZER = OptimizerConfig(warmup=0.2, clip_norm=0.5, epsilon=1e-6)
HEAD = HeadConfig(dropout=0.1)
BATCHES = [tiny.batch([[3, 4], [8], [2, 2], [5]], 8, seed) for seed in range(3)]


@dataclasses.dataclass(frozen=True)
class Own:
    """A member's settings."""

    method: str
    seed: int = 0
    rate: float = 3e-3
    decay: float = 0.01

    @property
    def model(self):
        layers = 2 if 'layers=1' in self.method or 'leave_out' in self.method else 1
        config = dataclasses.replace(tiny.CONFIG, layers=layers)
        return tiny.model(registry.create(self.method), HEAD, config=config)

    @functools.cached_property
    def tree(self):
        return initialise(self.model)(jax.random.key(self.seed), backbone(self.model.config))

    @property
    def key(self):
        return jax.random.fold_in(jax.random.key(self.seed), 1)


@functools.cache
def initialise(model):
    return jax.jit(model.init)


backbone = functools.cache(tiny.backbone)


def optimizer(rate, decay):
    return make_optimizer(OPTIMIZER, STEPS, rate, decay)


@functools.cache
def step_alone(model):
    """Return the compiled step of a run of one; rate and decay are arguments to compile it once."""

    @jax.jit
    def step(trainable, state, frozen, batch, key, number, rate, decay):
        tx = optimizer(rate, decay)
        return steps.train_step(
            trainable, state, frozen, batch, key, number, model=model, task=TASK, optimizer=tx
        )

    return step


def alone(own, count=STEPS):
    """Return the trained leaves and the loss of each step of a run of one."""
    model = own.model
    trainable, frozen = trees.partition(own.tree, model.rules)
    state, losses = optimizer(own.rate, own.decay).init(trainable), []
    for number in range(count):
        batch, settings = BATCHES[number % len(BATCHES)], (own.rate, own.decay)
        trainable, state, metrics = step_alone(model)(
            trainable, state, frozen, batch, own.key, number, *settings
        )
        losses.append(float(metrics['loss']))
    return jax.device_get(trainable), losses


def widen(owns):
    """Return the model, the stacked trainable leaves, the frozen ones, traits, and own shapes."""
    methods = tuple(dict.fromkeys(own.model.method for own in owns))
    widest = bank.widest(methods) if len(methods) > 1 else methods[0]
    model = dataclasses.replace(owns[0].model, method=widest)
    trained, factors, shapes = [], [], []
    for own in owns:
        method, adapter = own.model.method, own.tree['adapters']['default']
        padded = own.tree | {'adapters': {'default': bank.pad(method, adapter, widest)}}
        trained.append(trees.partition(padded, model.rules)[0])
        multipliers = {'adapters': {'default': bank.multipliers(method, adapter, widest)}}
        factors.append(trees.partition(multipliers, model.rules)[0])
        shapes.append(trees.partition(own.tree, own.model.rules)[0])
    traits = Traits(
        key=jnp.stack([own.key for own in owns]),
        learning_rate=jnp.array([own.rate for own in owns]),
        weight_decay=jnp.array([own.decay for own in owns]),
        multipliers=population.stack(factors),
        constants={},
    )
    frozen = trees.partition(padded, model.rules)[1]
    return model, population.stack(trained), frozen, traits, shapes


def start(owns, chunk=0, mesh=None):
    """Return the compiled step, the state at the beginning, and the step's other inputs."""
    model, trainable, frozen, traits, shapes = widen(owns)
    opt_state = jax.vmap(optimizer(1.0, 0.0).init)(trainable)
    state = State(trainable, opt_state, jnp.ones(len(owns), bool))
    mesh = mesh or sharding.make_mesh(1)
    state, traits = sharding.put((state, traits), sharding.by_members(mesh))
    frozen = sharding.put_replicated(frozen, mesh)
    step = population.jit_population_step(
        state, mesh, model=model, task=TASK, make_optimizer=optimizer, chunk=chunk
    )
    return step, state, traits, frozen, shapes


def together(owns, chunk=0, count=STEPS, mesh=None):
    """Return what `alone` does for each member, and the metric `good` of each step."""
    step, state, traits, frozen, shapes = start(owns, chunk, mesh)
    losses, good = [], []
    for number in range(count):
        batch = BATCHES[number % len(BATCHES)]
        batch = batch if mesh is None else sharding.put_batch(batch, mesh)
        state, metrics = step(state, traits, frozen, batch, number)
        losses.append(np.asarray(metrics['loss']))
        good.append(np.asarray(metrics['good']))
    assert step._cache_size() == 1
    trainable = jax.device_get(state.trainable)
    own = [population.unpad(population.unstack(trainable, i), x) for i, x in enumerate(shapes)]
    return own, np.stack(losses, 1), np.stack(good, 1)


PFEIFFER = 'pfeiffer[size={},leave_out=[0]]'
METHODS = {
    'pfeiffer': (PFEIFFER, (3, 5)),
    'lora': ('lora[r={},alpha=4]', (2, 3)),
    'houlsby': ('houlsby[size={}]', (3, 5)),
    'union': ('lora[r={},alpha=4]|houlsby[size=4]', (2, 3)),
}


def members(text, sizes, chosen=(0, 5, 11, 14)):
    """Return some of all combinations of seed, rate, decay and size."""
    grid = list(itertools.product((0, 1), (1e-3, 5e-3), (0.0, 0.1), sizes))
    return [Own(text.format(size), *rest) for *rest, size in (grid[i] for i in chosen)]


def check_equal(one, other, tolerance, label=''):
    for path, leaf in trees.flatten(one).items():
        found = trees.flatten(other)[path]
        assert found.shape == leaf.shape
        np.testing.assert_allclose(found, leaf, atol=tolerance, rtol=0, err_msg=f'{label} {path}')


@pytest.mark.parametrize(
    'name', [pytest.param(m, marks=[] if m == 'union' else pytest.mark.slow) for m in METHODS]
)
def test_each_member_is_the_run_done_alone(name):
    owns = members(*METHODS[name])
    found, losses, good = together(owns, chunk=2 if name == 'pfeiffer' else 0)
    assert good.all()
    for own, trained, seen in zip(owns, found, losses, strict=True):
        expected, expected_losses = alone(own)
        np.testing.assert_allclose(seen, expected_losses, atol=1e-5, rtol=0)
        check_equal(expected, trained, 1e-5, own)
        start, _ = trees.partition(own.tree, own.model.rules)
        moved = [np.abs(leaf - trees.flatten(start)[p]).max() for p, leaf in
                 trees.flatten(trained).items()]  # fmt: skip
        assert max(moved) > 1e-2


@pytest.mark.parametrize(
    'method', ['top_layers[layers=1]', pytest.param('full', marks=pytest.mark.slow)]
)
def test_members_have_their_own_leaves_of_the_backbone(method):
    owns = [Own(method), Own(method, seed=1, rate=1e-3)]
    found, losses, _ = together(owns, count=4)
    for own, trained, seen in zip(owns, found, losses, strict=True):
        expected, expected_losses = alone(own, count=4)
        np.testing.assert_allclose(seen, expected_losses, atol=1e-5, rtol=0)
        assert trees.flatten(trained).keys() == trees.flatten(expected).keys()
        check_equal(expected, trained, 1e-5, own.method)


def test_how_many_are_computed_at_a_time_changes_no_number():
    owns = members(*METHODS['pfeiffer'])
    whole, losses, _ = together(owns, 0, count=4)
    for chunk in (1, 4):
        parts, seen, _ = together(owns, chunk, count=4)
        np.testing.assert_allclose(seen, losses, atol=1e-6)
        for one, other in zip(whole, parts, strict=True):
            check_equal(one, other, 1e-6)


@pytest.mark.parametrize(
    ('devices', 'chunk'), [(4, 1), pytest.param(2, 1, marks=pytest.mark.slow), (2, 0)]
)
def test_members_may_be_spread_over_the_devices(devices, chunk):
    owns = members(*METHODS['lora'])
    mesh = sharding.make_mesh(devices, members=len(owns))
    assert mesh.shape[sharding.MEMBERS] == devices and sharding.row_parts(mesh) == 1
    expected, losses, _ = together(owns, 1, count=4)
    found, seen, _ = together(owns, chunk, count=4, mesh=mesh)
    np.testing.assert_allclose(seen, losses, atol=1e-6)
    for one, other in zip(expected, found, strict=True):
        check_equal(one, other, 1e-6)


@pytest.mark.parametrize('devices', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_devices_with_members_of_their_own_never_meet_and_skip_those_that_ended(devices):
    """XLA ends a process of which one device waits for another for more than a minute."""
    owns = members(*METHODS['lora'])
    mesh = sharding.make_mesh(devices, members=len(owns))
    step, state, traits, frozen, _ = start(owns, 1, mesh)
    batch = sharding.put_batch(BATCHES[0], mesh)
    program = step.lower(state, traits, frozen, batch, np.int32(0)).compile().as_text()
    assert not re.search(r'all-(gather|reduce|to-all)|collective', program)
    assert 'conditional(' in program


def test_one_that_diverges_stays_at_its_last_good_state_and_disturbs_nobody():
    owns = members(*METHODS['pfeiffer'], chosen=(0, 3, 5))
    mad = dataclasses.replace(owns[1], rate=1e12)
    calm, losses, _ = together(owns, count=12)
    found, seen, good = together([owns[0], mad, owns[2]], count=12)
    for i in (0, 2):
        # The others are bit by bit what they are beside a member that does not.
        np.testing.assert_array_equal(seen[i], losses[i])
        assert toy_bits(found[i]) == toy_bits(calm[i])
        assert good[i].all()
    assert good[1][0] and not good[1].all()
    steps_taken = int(np.argmin(good[1]))
    assert not good[1][steps_taken:].any() and not np.isfinite(seen[1][steps_taken])
    last, _ = alone(mad, count=steps_taken)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found[1]))
    for path, leaf in trees.flatten(last).items():
        # Rounded as sums of its largest entries are, which by now are some 1e21.
        tolerance = 1e-5 * np.abs(leaf).max()
        np.testing.assert_allclose(
            trees.flatten(found[1])[path], leaf, rtol=1e-5, atol=tolerance, err_msg=path
        )


def toy_bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(tree).items()}


def test_one_that_is_finished_is_not_moved():
    owns = members(*METHODS['pfeiffer'], chosen=(0, 3))
    step, state, traits, frozen, _ = start(owns)
    state, _ = step(state, traits, frozen, BATCHES[0], 0)
    mesh = sharding.make_mesh(1)
    state = state.replace(alive=sharding.put_replicated(jnp.array([True, False]), mesh))
    before = jax.device_get(state)
    state, metrics = step(state, traits, frozen, BATCHES[1], 1)
    after = jax.device_get(state)
    assert metrics['good'].all() and after.alive.tolist() == [True, False]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
    counts = [x for x in jax.tree.leaves(after.opt_state) if x.dtype == np.int32]
    assert counts and all(count.tolist() == [2, 1] for count in counts)
    assert step._cache_size() == 1


def products(jaxpr):
    """Return the shapes of the results of all matrix products, those of inner programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            found.append(equation.outvars[0].aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += products(inner)
    return found


@pytest.mark.parametrize(('count', 'chunk'), [(5, 0), (10, 5)])
def test_what_lies_below_the_first_adapted_place_is_computed_once(count, chunk):
    """Adapted is the end of the last feed-forward network: two blocks of eight products precede."""
    owns = [Own(PFEIFFER.format(4), seed) for seed in range(count)]
    model, trainable, frozen, traits, _ = widen(owns)
    opt_state = jax.vmap(optimizer(1.0, 0.0).init)(trainable)
    state = State(trainable, opt_state, jnp.ones(count, bool))
    step = functools.partial(
        population.population_step, model=model, task=TASK, make_optimizer=optimizer, chunk=chunk
    )
    shapes = products(jax.make_jaxpr(step)(state, traits, frozen, BATCHES[0], 0).jaxpr)
    # No other axis has a length of 5.
    assert len([shape for shape in shapes if 5 not in shape]) == 16
    # Down, up, pooling and head, and for their gradients six more.
    assert len([shape for shape in shapes if 5 in shape]) == 10


def test_one_after_another_needs_no_second_copy_of_all_states():
    def needed(count):
        step, state, traits, frozen, _ = start([Own('full', seed) for seed in range(count)], 1)
        compiled = step.lower(state, traits, frozen, BATCHES[0], np.int32(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes, trees.size_bytes(state)

    (few, few_states), (many, many_states) = needed(3), needed(8)
    assert many - few < 0.1 * (many_states - few_states)


def test_common_leaves_are_kept_once():
    one = {'a': {'same': np.ones(3), 'own': np.zeros(2)}}
    two = {'a': {'same': np.ones(3), 'own': np.ones(2)}}
    common, own = population.split_common([one, two])
    assert set(trees.flatten(common)) == {'a/same'} and common['a']['same'].shape == (3,)
    np.testing.assert_array_equal(own['a']['own'], [[0, 0], [1, 1]])
