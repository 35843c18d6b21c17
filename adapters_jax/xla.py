"""What XLA is told when it compiles a program, per platform, each with its measured reason.

Options are given to a program and not to the process (`XLA_FLAGS`), so that a library call changes
nothing for other programs, and an option that a version of XLA does not know can be left out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Options = dict[str, str | int | bool]

# XLA 0.10 hands matrix products of a CPU, and what is computed before and after them, to YNNPACK.
# Without it a forward pass is faster, a training step takes two thirds of the memory for
# temporaries, and a tenth less time: all of it measured in
# experiments/results/bench/products.json. The option lists what YNNPACK may have: single
# convolutions, of which there are none.
EIGEN_PRODUCTS: Options = {
    'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'
}
# A CPU's schedule of most concurrency computes as soon as it can what the backward pass needs much
# later (dropped attention weights, or with rematerialisation all activations) and holds it all;
# without, a step takes three quarters of the temporaries, and as long. Accelerators have none such.
# And it takes barriers away before it looks for what is computed twice, so that it kept for the
# backward pass what rematerialisation was to compute again (queries, keys, values and scores), and
# computed again what was to be written down once (`gradient_once`).
LEAN: Options = {
    'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
    'xla_disable_hlo_passes': 'cse_barrier_expander',
}


def options(placed: Any = (), lean: bool = False, few: bool = False) -> Options:
    """Return the options for a program whose arguments lie where the leaves of `placed` do.

    Leaves without a place are on the default backend. With `lean`, operations follow one another
    so that as little as possible is held at a time. `few` says that most products are of few rows,
    as where texts are written word by word: YNNPACK then is faster with several texts at a time,
    and a little slower with one (`eigen_over_ours` of the race `decoding` in
    experiments/results/bench/bench.json).
    """
    if _platform(placed) != 'cpu':
        return {}
    return (EIGEN_PRODUCTS if not few and _accepted() else {}) | (LEAN if lean else {})


def apart(x: Float[Array, '...']) -> Float[Array, '...']:
    """Return `x`, computed on a CPU in the way that is written, whatever is made of it then.

    Of a product that is transposed XLA makes a product with its factors changed over, and so takes
    away what an order of factors was chosen for. It holds in programs compiled with `LEAN`.
    """
    return jax.lax.optimization_barrier(x) if jax.default_backend() == 'cpu' else x


@jax.custom_vjp
def gradient_once(x: Float[Array, '... D']) -> Float[Array, '... D']:
    """Return `x`; its gradient is written down once, where XLA would do it again for each reader.

    The gradient along the residual connections has several readers in each layer, all of which
    compute it from what the layers above have added: on a CPU, work that grows with the square of
    the number of layers, and of a step of MiniLM's six layers a seventh.
    """
    return x


def _alone(_: None, gradient: Float[Array, '... D']) -> tuple[Array]:
    # On a CPU the barrier holds in programs that are compiled with `LEAN`; on a TPU none was timed.
    held = jax.default_backend() in ('cpu', 'gpu')
    return (jax.lax.optimization_barrier(gradient) if held else gradient,)


gradient_once.defvjp(lambda x: (x, None), _alone)


def _platform(placed: Any) -> str:
    for leaf in jax.tree.leaves(placed):
        if getattr(leaf, 'sharding', None) is not None:
            return next(iter(leaf.sharding.device_set)).platform
    return jax.default_backend()


@functools.cache
def _accepted() -> bool:
    """Tell whether this version of XLA knows `EIGEN_PRODUCTS`."""
    try:
        jax.jit(jnp.negative, compiler_options=EIGEN_PRODUCTS).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError as error:
        if 'No such compile option' not in str(error):
            raise
        return False
    return True
