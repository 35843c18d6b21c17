"""The folders of PEFT: what other code needs to recognise, read and write them."""

from pathlib import Path

from adapters_jax.interop import hub
from adapters_jax.interop.peft import configs
from adapters_jax.interop.peft.reading import load
from adapters_jax.interop.peft.writing import save

__all__ = ['backbone_name', 'is_folder', 'load', 'save']


def is_folder(directory: Path | str) -> bool:
    """Tell whether a folder holds a PEFT adapter, of whatever type."""
    return 'peft_type' in (configs.parse(Path(directory)) or {})


def backbone_name(directory: Path | str) -> str:
    """Return the name of the backbone that a folder gives, or '' where it gives none.

    Where the checkpoint has a short name here, it is that.

    Raises:
        FileNotFoundError, ValueError: no config, or one that cannot be read.
    """
    return hub.short_name(configs.read(Path(directory))['base_model_name_or_path'] or '')
