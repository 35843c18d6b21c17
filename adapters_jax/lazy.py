"""Functions of libraries that take long to import, which are imported when one is first called.

scikit-learn and scipy take two seconds, and transformers as long where torch is installed beside
it; a command is to tell a mistake in its flags before that, and most processes need none of them.
"""

import importlib
from collections.abc import Callable
from typing import Any


class Functions:
    """The functions of a module, by their names."""

    def __init__(self, module: str) -> None:
        """Name the module; nothing is imported."""
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function that imports the module and calls what has this name there."""
        if name.startswith('__'):  # what Python asks of any object, such as __wrapped__
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(self._module), name)(*arguments, **options)

        return call
