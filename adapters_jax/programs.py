"""Compiled programs, kept for later processes, and made anew where what is kept is damaged.

JAX writes a program where it will lie, so a kill or a full disk leaves a part of it. It compiles
such a one again but never replaces it: every later process would, too.
"""

import contextlib
import glob
import hashlib
import logging
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import jax

from adapters_jax import wheels

_DEFAULT_SECONDS = 1.0  # that a program takes to compile which JAX keeps
_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")
_LOG = logging.getLogger(__name__)


def keep() -> None:
    """Let later processes find what this one compiles, unless JAX has been told where, or not to.

    Programs for a CPU use the instructions it has, which JAX's names of programs do not tell apart.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = wheels.cache_directory() / 'programs' / _processor()
        jax.config.update('jax_compilation_cache_dir', str(folder))
        # Also the small ones, some fifty of which a run compiles before its first step.
        if jax.config.jax_persistent_cache_min_compile_time_secs == _DEFAULT_SECONDS:
            jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    show = warnings.showwarning

    def mend_or_show(message: Warning | str, *where: Any, **options: Any) -> None:
        damaged = _DAMAGED.match(str(message))
        if damaged:
            remove(damaged[1])
        else:
            show(message, *where, **options)

    # The only word of it; JAX compiles next, and keeps what it finds no file of.
    warnings.showwarning = mend_or_show


def remove(name: str) -> None:
    """Remove what is kept of all programs of this name; JAX does not say which one is damaged."""
    folder = Path(jax.config.jax_compilation_cache_dir)
    for path in folder.glob(f'{glob.escape(name)}-*-cache'):
        with contextlib.suppress(OSError):  # not ours: it is compiled every time
            path.unlink()
    _LOG.warning('the program %s, kept in %s, is damaged: compiling it again', name, folder)


def _processor() -> str:
    """Return a name for the kind of this machine's processor: a digest of what it can do."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        described += ''.join(sorted({line for line in lines if line[:5] in ('flags', 'Featu')}))
    return hashlib.sha256(described.encode()).hexdigest()[:12]
