"""Adapter fine-tuning of pretrained transformers in JAX: a frozen backbone, many small adapters."""

__version__ = '0.1.0'
