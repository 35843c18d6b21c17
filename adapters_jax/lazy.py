"""Functions of libraries that take long to import, which are imported when one is first called.

scikit-learn and scipy take two seconds, and transformers as long where torch is installed beside
it; a command is to tell a mistake in its flags before that, and most processes need none of them.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Functions:
    """The functions of a module, by their names."""

    def __init__(self, module: str, without: str = '') -> None:
        """Name the module; nothing is imported.

        `without` is a library that it imports where there is one, and can do without.
        """
        self._module, self._without = module, without

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function that imports the module and calls what has this name there."""
        if name.startswith('__'):  # what Python asks of any object, such as __wrapped__
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            with _hidden(self._without):
                module = importlib.import_module(self._module)
            return getattr(module, name)(*arguments, **options)

        return call


@contextlib.contextmanager
def _hidden(library: str) -> Iterator[None]:
    """Let imports not find a library, unless somebody has imported it before."""
    if not library or library in sys.modules:
        yield
        return
    sys.modules[library] = None
    try:
        yield
    finally:
        del sys.modules[library]
