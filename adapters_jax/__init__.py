"""Adapter fine-tuning of pretrained transformers in JAX: a frozen backbone, many small adapters.

Each command is a module with a function of the same name: `train.train`, `evaluate.evaluate`,
`predict.predict`, `convert.convert`, `sweep.sweep`. docs/python.md has examples, and shows how to
keep a finished adapter in memory; `defaults` documents every key of a config.
"""

__version__ = '0.1.0'
