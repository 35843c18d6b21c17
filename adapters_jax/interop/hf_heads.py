"""Classification heads as Hugging Face models have them, and as ours.

`BertForSequenceClassification` puts one dense layer on the pooler's output; most others one or two
on the first token. All call the last of them `classifier` or something in it, and so do the folders
that hold nothing but what was trained. Models that tag words or find answers have one dense layer
on every token, whatever the family.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.bert import BertStem
from adapters_jax.models.heads import TOKENS, HeadConfig
from adapters_jax.params import Tree

CLASSIFIER, ANSWERS = 'classifier', 'qa_outputs'
_TEXTS, _IMAGES = 'ForSequenceClassification', 'ForImageClassification'
# The tasks whose heads are such a classifier, and what the config of a model says of each.
PROBLEMS = {
    'classification': 'single_label_classification',
    'image_classification': 'single_label_classification',
    'multi_label': 'multi_label_classification',
    'regression': 'regression',
}


class Classifier(NamedTuple):
    """A classifier: its dense layers, first to last, and what they stand on."""

    layers: tuple[str, ...]
    pooling: str
    activation: str = 'tanh'
    model: str = _TEXTS  # how the name of the class ends


_TWO = (f'{CLASSIFIER}.dense', f'{CLASSIFIER}.out_proj')
# Models with a decoder classify its states, which no head of ours does.
_CLASSIFIERS = {
    'bert': Classifier((CLASSIFIER,), 'pooler'),
    'roberta': Classifier(_TWO, 'cls'),
    'electra': Classifier(_TWO, 'cls', 'gelu'),
    'distilbert': Classifier((f'pre_{CLASSIFIER}', CLASSIFIER), 'cls', 'relu'),
    'vit': Classifier((CLASSIFIER,), 'cls', model=_IMAGES),
    'deit': Classifier((CLASSIFIER,), 'cls', model=_IMAGES),
}
# The tasks with outputs for each token of a text.
OF_TOKENS = {
    'tagging': Classifier((CLASSIFIER,), TOKENS, model='ForTokenClassification'),
    'question_answering': Classifier((ANSWERS,), TOKENS, model='ForQuestionAnswering'),
}


def _classifier(family: str, task: str | None) -> Classifier:
    return OF_TOKENS[task] if task in OF_TOKENS else _CLASSIFIERS[family]


def tells_types(config: BackboneConfig) -> bool:
    """Tell whether a backbone has token types, by which it tells the texts of a pair apart."""
    return isinstance(config.stem, BertStem) and config.stem.token_types > 1


def model_class(family: str, task: str | None = None) -> str:
    """Return how the name of a family's model with a classifier ends."""
    return _classifier(family, task).model


def is_class(name: Any, family: str, task: str | None = None) -> bool:
    """Tell whether a class of models has a classifier that is one of ours."""
    known = family in _CLASSIFIERS
    return known and isinstance(name, str) and name.endswith(model_class(family, task))


def is_head(tensor: str) -> bool:
    """Tell whether a tensor is a classifier's, by its name in a model with one."""
    return tensor.startswith((f'{CLASSIFIER}.', f'pre_{CLASSIFIER}.', f'{ANSWERS}.'))


def without_pooler(family: str, task: str | None = None) -> bool:
    """Tell whether a family's models with a classifier have no pooler, though bare ones do."""
    return family in _CLASSIFIERS and _classifier(family, task).pooling != 'pooler'


def head_config(config: BackboneConfig, task: str | None = None) -> HeadConfig:
    """Return our description of a family's classifier."""
    own = _classifier(config.family, task)
    return HeadConfig(
        pooling=own.pooling,
        layers=len(own.layers),
        activation=own.activation,
        dropout=config.block.dropout,
    )


def tensor_names(family: str, task: str | None = None) -> dict[str, tuple[str, bool]]:
    """Return, for each tensor of the classifier, our path in the head and whether to transpose."""
    names = {}
    for i, layer in enumerate(_classifier(family, task).layers):
        names[f'{layer}.weight'] = (f'dense_{i}/kernel', True)
        names[f'{layer}.bias'] = (f'dense_{i}/bias', False)
    return names


def read(
    tensors: Mapping[str, np.ndarray], config: BackboneConfig, task: str | None = None
) -> tuple[HeadConfig, Tree, int]:
    """Return our head of a classifier's tensors: its description, parameters and outputs.

    `task` is one of `OF_TOKENS`; any other means a classifier of whole inputs.

    Raises:
        ValueError: tensors that are missing, unexpected or of the wrong shape, or a classifier on
            the pooler of a backbone that has none.
    """
    if config.family not in _CLASSIFIERS:
        raise ValueError(
            f'a classifier of a {config.family} model is not supported; expected one of '
            f'{", ".join(_CLASSIFIERS)}'
        )
    names = tensor_names(config.family, task)
    problems = [f'{name} is missing' for name in names if name not in tensors]
    problems += [f'{name} is unexpected' for name in tensors if name not in names]
    if problems:
        raise ValueError(
            f'the classifier is not one of a {config.family} model '
            f'{model_class(config.family, task)}: {"; ".join(problems)}'
        )
    if head_config(config, task).pooling == 'pooler' and not config.pooler:
        raise ValueError(
            'the classifier stands on a pooler, which the backbone does not have; use the '
            'checkpoint that it was trained on'
        )
    outputs = _check_shapes(tensors, config, _classifier(config.family, task).layers)
    tree: Tree = {}
    for name, (path, transpose) in names.items():
        layer, leaf = path.split('/')
        tensor = tensors[name]
        tree.setdefault(layer, {})[leaf] = np.ascontiguousarray(tensor.T if transpose else tensor)
    return head_config(config, task), tree, outputs


def _check_shapes(
    tensors: Mapping[str, np.ndarray], config: BackboneConfig, layers: Sequence[str]
) -> int:
    """Return the number of outputs."""
    hidden = config.block.hidden
    last = tensors[f'{layers[-1]}.weight']
    outputs = len(last) if last.ndim else 0
    for layer in layers:
        width = outputs if layer == layers[-1] else hidden
        for leaf, shape in (('weight', (width, hidden)), ('bias', (width,))):
            found = tensors[f'{layer}.{leaf}'].shape
            if found != shape or not outputs:
                raise ValueError(
                    f'{layer}.{leaf} has shape {found}, expected {shape}: the '
                    f"backbone's hidden size is {hidden}"
                )
    return outputs


def write(
    head: Mapping[str, Any], tree: Tree, config: BackboneConfig, task: str | None = None
) -> dict[str, np.ndarray] | None:
    """Return the tensors that compute our head in a Hugging Face model, or None where none do.

    `head` is the description of a `HeadConfig` as JSON values. BERT's pooler is a dense layer and
    tanh on the first token, so a head of two layers is a pooler and a classifier. `task` is as in
    `read`.
    """
    chosen = (head['pooling'], head['layers'])
    if task in OF_TOKENS:
        return _torch(tree, tensor_names(config.family, task)) if chosen == (TOKENS, 1) else None
    own = _CLASSIFIERS.get(config.family)
    if own is None or (chosen[1] > 1 and head['activation'] != own.activation):
        return None
    if config.family == 'bert' and chosen == ('cls', 2):
        last = _torch({'dense_0': tree['dense_1']}, tensor_names('bert'))
        return last | _torch({'pooler': tree['dense_0']}, _POOLER)
    if chosen != (own.pooling, len(own.layers)):
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
    last = (CLASSIFIER, ANSWERS)
    return len([x for name, x in classifier.items() if name.startswith(last)][-1])


def equivalent(family: str, task: str | None = None) -> str:
    """Say which heads a family's models can have, for messages."""
    if task in OF_TOKENS:
        return 'head.layers=1'
    if family not in _CLASSIFIERS:
        return 'a model without a head'
    own = _CLASSIFIERS[family]
    plain = f"head.pooling='{own.pooling}' and head.layers={len(own.layers)}"
    if len(own.layers) > 1 and own.activation != 'tanh':
        plain += f" and head.activation='{own.activation}'"
    return f"{plain}, or head.pooling='cls' and head.layers=2" if family == 'bert' else plain
