"""Compiled programs of ours to time, their arithmetic, and how fast this machine is at it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax import attention, sharding, xla
from adapters_jax.adapters import registry
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.model import Batch, Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree, partition
from adapters_jax.tasks.classification import Classification
from adapters_jax.training import cutting
from adapters_jax.training.dtypes import DTYPES
from adapters_jax.training.flops import product_flops
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer
from adapters_jax.training.step import jit_outputs, jit_train_step
from experiments.bench.timing import compare

TASK = Classification(labels=('no', 'yes'))
# What `adapters` gives a model, and Hugging Face's BERT comes with: two dense layers on the first
# token's state. Ours then computes of the last layer what that state needs.
HEAD = HeadConfig(pooling='cls', layers=2)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, what to call, and the arithmetic of its products."""

    call: Callable[[], Any]
    flops: float
    compiled: Any
    parts: int = 1  # that a batch is cut into

    @property
    def temporary(self) -> int:
        """The bytes of its temporaries."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def text(self) -> str:
        """Its instructions, as XLA has optimised them."""
        return self.compiled.as_text()


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Return rows of one text each, without padding."""
    rng = np.random.default_rng(0)
    shape, ones = (rows, length), np.ones((rows, 1), np.int32)
    return {
        'input_ids': rng.integers(1, vocabulary, shape).astype(np.int32),
        'token_type_ids': np.zeros(shape, np.int32),
        'positions': np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        'segments': np.ones(shape, np.int32),
        'starts': 0 * ones,
        'example_mask': ones > 0,
        'example_id': np.arange(rows, dtype=np.int32)[:, None],
        'label': rng.integers(0, 2, (rows, 1)).astype(np.int32),
    }


def padding(batch: Batch) -> float:
    """Return the share of a batch's tokens that belong to no text."""
    return float(np.mean(np.asarray(batch['segments']) == 0))


def make(
    backbone: LoadedBackbone,
    method: str,
    dtype: str = 'float32',
    dropped: int = 0,
    head: HeadConfig = HEAD,
) -> tuple[Model, Tree]:
    """Return a model with a classifying head, and all its parameters, on the device."""
    model = Model(
        backbone.config,
        registry.create(method),
        head,
        len(TASK.labels),
        dtype=DTYPES[dtype],
        dropped=dropped,
    )
    return model, jax.device_put(model.init(jax.random.key(0), backbone.params))


def inference(
    model: Model,
    params: Tree,
    batch: Batch,
    parts: int = 0,
    devices: int = 1,
    frozen_dtype: str = 'float32',
) -> Program:
    """Compile the forward pass without dropout, its rows spread over the devices.

    The batch is cut into so many parts, 0: as our commands do.
    """
    parts = parts or cutting.quick_parts(*batch['input_ids'].shape, devices)
    mesh = sharding.make_mesh(devices)
    everywhere = sharding.replicated(mesh)
    trainable, frozen = partition(params, model.rules)
    trees = [sharding.place(trainable, np.float32, everywhere)]
    trees.append(sharding.place(frozen, DTYPES[frozen_dtype], everywhere, shared=True))
    batch = sharding.put_batch(batch, mesh)
    with cutting.into(parts):
        program, flops = _compiled(functools.partial(jit_outputs, model), (*trees, batch))
    return Program(lambda: program(*trees, batch), flops, program, parts)


def training(
    model: Model,
    params: Tree,
    batch: Batch,
    parts: int = 0,
    devices: int = 1,
    frozen_dtype: str = 'float32',
) -> Program:
    """Compile a training step with dropout; each call takes the next.

    The batch is cut into so many parts, 0: as our commands do.
    """
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    mesh = sharding.make_mesh(devices)
    everywhere = sharding.replicated(mesh)
    trainable, frozen = partition(params, model.rules)
    state = [sharding.place(trainable, np.float32, everywhere)]
    state.append(jax.jit(optimizer.init, out_shardings=everywhere)(state[0]))
    frozen = sharding.place(frozen, DTYPES[frozen_dtype], everywhere, shared=True)
    batch = sharding.put_batch(batch, mesh)
    rest = (frozen, batch, jax.device_put(jax.random.key(1), everywhere), np.int32(0))
    parts = parts or cutting.quick_parts(*batch['input_ids'].shape)
    make_step = functools.partial(
        jit_train_step, *state, model=model, task=TASK, optimizer=optimizer, accumulate=parts
    )
    program, flops = _compiled(make_step, (*state, *rest))

    def call() -> Any:
        *state[:], metrics = program(*state, *rest)
        return metrics

    return Program(call, flops, program, parts)


def _compiled(make: Callable[[], Any], given: tuple[Any, ...]) -> tuple[Any, float]:
    """Compile what `make` returns for these arguments; return its products' arithmetic, too."""
    traced = make().trace(*given)
    program = traced.lower().compile()
    if jax.default_backend() == 'gpu':  # whose kernels say nothing of their products
        with attention.written_out():
            traced = make().trace(*given)
    return program, product_flops(traced.jaxpr)


def sizes() -> tuple[int, ...]:
    """Return the sizes of the square products of which the fastest is the machine's rate.

    On a CPU the largest no longer fits into the cache, which is slow where others use the memory.
    """
    return (1024, 2048) if jax.default_backend() == 'cpu' else (8192,)


def product_rate(dtype: str, repeats: int = 5) -> float:
    """Return the FLOP/s of the fastest of these products, as they are now."""
    made = {size: product(size, dtype) for size in sizes()}
    times = compare({size: program.call for size, program in made.items()}, repeats)
    return max(program.flops / times[size].median for size, program in made.items())


def product(size: int, dtype: str = 'float32') -> Program:
    """Compile a square matrix product, to see how fast this machine is at it."""
    # Random numbers: a GPU multiplies ones an eighth faster, since fewer of its wires change.
    square = jax.random.normal(jax.random.key(0), (size, size), DTYPES[dtype])
    jitted = jax.jit(jnp.matmul, compiler_options=xla.options())
    program = jitted.lower(square, square).compile()
    return Program(lambda: program(square, square), 2.0 * size**3, program)
