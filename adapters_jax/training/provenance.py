"""Where numbers come from: hardware, library versions and commit, for summaries and tables."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'transformers', 'tokenizers', 'numpy')


def describe() -> dict[str, Any]:
    """Return hardware, versions and commit as JSON values."""
    return {'hardware': hardware(), 'versions': versions(), 'commit': commit()}


def hardware() -> str:
    """Return what JAX computes on, in words."""
    kind = jax.devices()[0].device_kind
    if kind != 'cpu':
        return f'{jax.device_count()} x {kind}'
    return f'{os.cpu_count()} cores of {_processor()}'


def _processor() -> str:
    """Return the processor's name where Linux tells it, else its architecture."""
    information = Path('/proc/cpuinfo')
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that numbers depend on."""
    python = '.'.join(str(part) for part in sys.version_info[:3])
    return {'python': python} | {name: metadata.version(name) for name in PACKAGES}


def commit() -> str:
    """Return the commit of this checkout, with a '+' where files have changed.

    A copy without its history, as clusters are often given, is of what ADAPTERS_JAX_COMMIT says, or
    'unknown'.
    """
    root = Path(__file__).parents[2]
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty=+', '--abbrev=12']
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get('ADAPTERS_JAX_COMMIT', 'unknown')
    return done.stdout.strip()
