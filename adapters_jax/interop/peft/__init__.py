"""The folders of the library `peft` (version 0.21.2), read and written without it."""

from adapters_jax.interop.peft.folder import backbone_name, is_folder, load, save

__all__ = ['backbone_name', 'is_folder', 'load', 'save']
