"""The file format of the AdapterHub and its library `adapters` (version 1.3.0), read and written.

Nothing here needs torch: `.bin` files are read without being executed, and what is written is
safetensors, which the library reads with `load_adapter(directory, use_safetensors=True)`.
"""

from adapters_jax.interop.adapterhub.folder import backbone_name, is_folder, load, save

__all__ = ['backbone_name', 'is_folder', 'load', 'save']
