"""Classification heads as Hugging Face models have them, and as ours.

`BertForSequenceClassification` puts one dense layer on the pooler's output;
`RobertaForSequenceClassification` a dense layer, tanh and another dense layer on the first token.
`ViTForImageClassification` and DeiT's put one dense layer on the first vector. All call it
`classifier`, and so do the folders that hold nothing but what was trained.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree

CLASSIFIER = 'classifier'
# Of each family: the dense layers' names below `classifier`, first to last.
_LAYERS = {'bert': ('',), 'roberta': ('dense.', 'out_proj.'), 'vit': ('',), 'deit': ('',)}
_POOLING = {'bert': 'pooler', 'roberta': 'cls', 'vit': 'cls', 'deit': 'cls'}


def tensor_names(family: str) -> dict[str, tuple[str, bool]]:
    """Return, for each tensor of the classifier, our path in the head and whether to transpose."""
    names = {}
    for i, layer in enumerate(_LAYERS[family]):
        names[f'{CLASSIFIER}.{layer}weight'] = (f'dense_{i}/kernel', True)
        names[f'{CLASSIFIER}.{layer}bias'] = (f'dense_{i}/bias', False)
    return names


def read(tensors: Mapping[str, np.ndarray], config: BackboneConfig) -> tuple[HeadConfig, Tree, int]:
    """Return our head of a classifier's tensors: its description, parameters and outputs.

    Raises:
        ValueError: tensors that are missing, unexpected or of the wrong shape, or a classifier on
            the pooler of a backbone that has none.
    """
    names = tensor_names(config.family)
    problems = [f'{name} is missing' for name in names if name not in tensors]
    problems += [f'{name} is unexpected' for name in tensors if name not in names]
    if problems:
        raise ValueError(
            f'the classifier is not one of a {config.family} model: {"; ".join(problems)}'
        )
    if _POOLING[config.family] == 'pooler' and not config.pooler:
        raise ValueError(
            'the classifier stands on a pooler, which the backbone does not have; use the '
            'checkpoint that it was trained on'
        )
    outputs = _check_shapes(tensors, config)
    tree: Tree = {}
    for name, (path, transpose) in names.items():
        layer, leaf = path.split('/')
        tensor = tensors[name]
        tree.setdefault(layer, {})[leaf] = np.ascontiguousarray(tensor.T if transpose else tensor)
    head = HeadConfig(
        pooling=_POOLING[config.family],
        layers=len(_LAYERS[config.family]),
        activation='tanh',
        dropout=config.block.dropout,
    )
    return head, tree, outputs


def _check_shapes(tensors: Mapping[str, np.ndarray], config: BackboneConfig) -> int:
    """Return the number of outputs."""
    hidden, layers = config.block.hidden, _LAYERS[config.family]
    last = tensors[f'{CLASSIFIER}.{layers[-1]}weight']
    outputs = len(last) if last.ndim else 0
    for layer in layers:
        width = outputs if layer == layers[-1] else hidden
        for leaf, shape in (('weight', (width, hidden)), ('bias', (width,))):
            found = tensors[f'{CLASSIFIER}.{layer}{leaf}'].shape
            if found != shape or not outputs:
                raise ValueError(
                    f'{CLASSIFIER}.{layer}{leaf} has shape {found}, expected {shape}: the '
                    f"backbone's hidden size is {hidden}"
                )
    return outputs


def write(
    head: Mapping[str, Any], tree: Tree, config: BackboneConfig
) -> dict[str, np.ndarray] | None:
    """Return the tensors that compute our head in a Hugging Face model, or None where none do.

    `head` is the description of a `HeadConfig` as JSON values. BERT's pooler is a dense layer and
    tanh on the first token, so a head of two layers is a pooler and a classifier.
    """
    chosen = (head['pooling'], head['layers'])
    if chosen[1] > 1 and head['activation'] != 'tanh':
        return None
    if config.family == 'bert' and chosen == ('cls', 2):
        last = _torch({'dense_0': tree['dense_1']}, tensor_names('bert'))
        return last | _torch({'pooler': tree['dense_0']}, _POOLER)
    if chosen != (_POOLING[config.family], len(_LAYERS[config.family])):
        return None
    return _torch(tree, tensor_names(config.family))


_POOLER = {
    'pooler.dense.weight': ('pooler/kernel', True),
    'pooler.dense.bias': ('pooler/bias', False),
}


def _torch(tree: Tree, names: Mapping[str, tuple[str, bool]]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, (path, transpose) in names.items():
        layer, leaf = path.split('/')
        tensor = np.asarray(tree[layer][leaf], np.float32)
        tensors[name] = np.ascontiguousarray(tensor.T if transpose else tensor)
    return tensors


def outputs(classifier: Mapping[str, np.ndarray]) -> int:
    """Return the number of outputs of a classifier's tensors."""
    return len([x for name, x in classifier.items() if name.startswith(CLASSIFIER)][-1])


def equivalent(family: str) -> str:
    """Say which heads a family's models can have, for messages."""
    plain = f"head.pooling='{_POOLING[family]}' and head.layers={len(_LAYERS[family])}"
    return f"{plain}, or head.pooling='cls' and head.layers=2" if family == 'bert' else plain
