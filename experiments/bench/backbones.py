"""Checkpoint folders that both sides of a race load: MiniLM, random weights in larger shapes."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from adapters_jax import files
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models import families
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.families import tensor_names
from adapters_jax.params import flatten

# Layers, hidden size, feed-forward size, heads (Devlin et al. 2019, section 3).
SHAPES = {'base': (12, 768, 3072, 12), 'large': (24, 1024, 4096, 16)}
NAMES = ('minilm', *SHAPES)


def folder(name: str, root: Path) -> Path:
    """Return the folder of a backbone by its name; random weights are written below `root` once.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f'unknown backbone {name!r}; known: {", ".join(NAMES)}')
    real = load_backbone('minilm').directory
    if name == 'minilm':
        return Path(real)
    target = root / f'random_{name}'
    if not (target / 'model.safetensors').exists():
        _write(name, Path(real), files.make_directory(target))
    return target


def _write(name: str, tokenizer: Path, target: Path) -> None:
    layers, hidden, feed_forward, heads = SHAPES[name]
    hf = {
        'model_type': 'bert',
        'architectures': ['BertModel'],
        'vocab_size': 30522,
        'hidden_size': hidden,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'intermediate_size': feed_forward,
        'max_position_embeddings': 512,
        'type_vocab_size': 2,
        'pad_token_id': 0,
    }
    config = families.read_config(hf)
    init = functools.partial(Backbone(config).init, method='initialise')
    leaves = flatten(jax.jit(init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])
    tensors = {
        theirs: np.ascontiguousarray(leaves[ours].T if transposed else leaves[ours])
        for theirs, (ours, transposed) in tensor_names(config).items()
    }
    (target / 'config.json').write_text(json.dumps(hf))
    for path in tokenizer.glob('*token*'):
        shutil.copy(path, target / path.name)
    save_file(tensors, target / 'model.safetensors', {'format': 'pt'})
