"""Settings that every test runs under; they must precede the first use of a JAX backend."""

import os
import platform

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# The tests spend their time in the compiler: without its optimisations they take a seventh of it.
# Without fused multiply-add a sum is rounded alike in every program that it is part of.
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
    + (' --xla_cpu_max_isa=AVX' if platform.machine() == 'x86_64' else ''),
)

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
