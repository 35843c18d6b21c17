"""A toy backbone and toy data, as files on the disk: what whole runs are tried on.

The backbone is a real checkpoint folder (config.json, model.safetensors, a fast WordPiece
tokenizer) of a tiny random BERT; the data can be learned from single words, so a few hundred steps
reach a known result.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from adapters_jax.models import families
from adapters_jax.models.backbone import Backbone, BackboneConfig
from adapters_jax.models.families import tensor_names
from adapters_jax.params import Tree, flatten, map_with_path

TOPICS = {
    'animal': ('cat', 'dog', 'horse', 'owl', 'fox'),
    'food': ('bread', 'soup', 'rice', 'apple', 'cheese'),
    'weather': ('rain', 'snow', 'wind', 'sun', 'storm'),
}
FILLERS = ('the', 'a', 'this', 'that', 'was', 'is', 'very', 'near', 'with', 'and', 'but', 'so')
GOOD, BAD = ('good', 'great', 'fine'), ('bad', 'awful', 'poor')
LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789.,!?\'"'
SPECIALS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')


def vocabulary() -> list[str]:
    """Return the words above, and letters to spell every other one with."""
    words = [word for topic in TOPICS.values() for word in topic]
    pieces = [*LETTERS, *('##' + letter for letter in LETTERS)]
    return list(dict.fromkeys([*SPECIALS, *words, *FILLERS, *GOOD, *BAD, *pieces]))


def write_backbone(
    folder: Path, *, layers: int = 1, hidden: int = 32, positions: int = 128, seed: int = 0
) -> str:
    """Write a random BERT as a checkpoint folder; return its name, for `config.backbone`."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = {
        'model_type': 'bert',
        'architectures': ['BertModel'],
        'vocab_size': len(vocabulary()),
        'hidden_size': hidden,
        'num_hidden_layers': layers,
        'num_attention_heads': 2,
        'intermediate_size': 2 * hidden,
        'max_position_embeddings': positions,
        'type_vocab_size': 2,
        'pad_token_id': 0,
    }
    (folder / 'config.json').write_text(json.dumps(hf))
    config = families.read_config(hf)
    leaves = {path: _calm(path, x) for path, x in flatten(random_backbone(config, seed)).items()}
    tensors = {
        theirs: np.ascontiguousarray(leaves[ours].T if transposed else leaves[ours])
        for theirs, (ours, transposed) in tensor_names(config).items()
    }
    save_file(tensors, folder / 'model.safetensors')
    _write_tokenizer(folder, positions)
    return str(folder)


def _calm(path: str, leaf: np.ndarray) -> np.ndarray:
    """Weaken everything but the word vectors, so that the last layer still knows the words."""
    if 'word' in path:
        return leaf
    centre = np.float32(path.endswith('scale'))
    return centre + np.float32(0.3) * (leaf - centre)


def _write_tokenizer(folder: Path, positions: int) -> None:
    ids = {word: number for number, word in enumerate(vocabulary())}
    tokenizers.BertWordPieceTokenizer(ids).save(str(folder / 'tokenizer.json'))
    settings = {'tokenizer_class': 'BertTokenizer', 'model_max_length': positions}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


Rows = list[tuple[str, ...]]


def texts(count: int, seed: int = 0, mean: float = 6.0) -> Rows:
    """Return (text, topic); lengths are skewed as those of real sentences."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        topic = list(TOPICS)[i % len(TOPICS)]
        words = fillers(rng, mean)
        for place in rng.choice(len(words), -(-len(words) // 4), replace=False):
            words[place] = str(rng.choice(TOPICS[topic]))
        rows.append((' '.join(words), topic))
    return rows


def ratings(count: int, seed: int = 0) -> Rows:
    """Return (text, number): the share of praise among the words that judge, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        good = int(rng.integers(0, 5))
        words = [*rng.choice(GOOD, good), *rng.choice(BAD, 4 - good)]
        rows.append((' '.join(map(str, rng.permutation(words))), f'{good / 2 - 1:.2f}'))
    return rows


def fillers(rng: np.random.Generator, mean: float) -> list[str]:
    """Return words that mean nothing, about `mean` of them."""
    size = int(np.clip(rng.lognormal(np.log(mean), 0.5), 2, 10 * mean))
    return [str(word) for word in rng.choice(FILLERS, size)]


def write_table(path: Path, header: Sequence[str], rows: Rows) -> str:
    """Write a CSV file, or a TSV file if the path says so; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    separator = '\t' if path.suffix == '.tsv' else ','
    lines = [separator.join(row) for row in ([header] if header else []) + [*rows]]
    path.write_text('\n'.join(lines) + '\n', 'utf-8')
    return str(path)


def write_texts(path: Path, count: int = 240, seed: int = 0, mean: float = 6.0) -> str:
    """Write a classification data set as a CSV file; return its path."""
    return write_table(path, ('text', 'label'), texts(count, seed, mean))


def write_ratings(path: Path, count: int = 240, seed: int = 0) -> str:
    """Write a regression data set as a CSV file; return its path."""
    return write_table(path, ('text', 'label'), ratings(count, seed))


def random_leaf(rng: np.random.Generator, path: str, shape: Sequence[int]) -> np.ndarray:
    """Return weights as large as those of a trained model, or larger."""
    noise = rng.standard_normal(shape)
    if path.endswith('scale'):
        noise = 1 + 0.3 * noise
    elif path.endswith('kernel'):
        noise *= 1.5 / math.sqrt(shape[0])
    elif path.endswith('bias'):
        noise *= 0.3
    return noise.astype(np.float32)


def random_backbone(config: BackboneConfig, seed: int) -> Tree:
    """Return random parameters of a backbone."""
    rng = np.random.default_rng(seed)
    return map_with_path(lambda path, leaf: random_leaf(rng, path, leaf.shape), _shapes(config))


@functools.cache
def _shapes(config: BackboneConfig) -> Tree:
    """Trace the initialisation, once for all of a process that use the backbone."""
    ids = jnp.ones((1, 1), jnp.int32)
    return jax.eval_shape(
        lambda: Backbone(config).init(jax.random.key(0), ids, method='initialise')['params']
    )
