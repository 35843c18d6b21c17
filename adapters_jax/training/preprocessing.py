"""The chain of preprocessing steps of a run and of a finished adapter, and who may tag for it.

`data.preprocess` knows no adapters. Here is what it is given where a step is an adapter itself, and
what a chain and a method must agree on: that what one gives, the other reads.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters_jax import params, tasks
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config
from adapters_jax.data.preprocess import chain, tags
from adapters_jax.data.preprocess.chain import Chain
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.tasks.task import Task

_LOG = logging.getLogger(__name__)


def make_chain(config: Config) -> Chain:
    """Return the chain that a config names.

    Raises:
        ValueError: an unknown step or option, or a tagger that cannot be had.
        FileNotFoundError: no tagging adapter there.
    """
    return chain.create(config.data.preprocess, load_adapter_tagger)


def chain_of(folder: AdapterFolder) -> Chain:
    """Return the chain that a finished adapter was trained with.

    Raises:
        ValueError, FileNotFoundError: a step that is not what it was then, or cannot be had.
    """
    return chain.from_json(folder.preprocess, load_adapter_tagger)


def load_adapter_tagger(directory: str) -> tags.LoadedTagger:
    """Return the tagger that a finished tagging adapter of this project is.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: an adapter for another task.
    """
    folder = adapter_folder.load(Path(directory))
    kind = folder.task.get('name')
    if kind != 'tagging':
        raise ValueError(
            f'tags[adapter={directory}]: {folder.name!r} is an adapter for {kind or "no task"}; '
            'expected one that was trained for tagging'
        )
    trees = folder.backbone_params, folder.adapter_params, folder.head_params
    content = params.fingerprint(dict(zip(('backbone', 'adapter', 'head'), trees, strict=True)))
    labels = tasks.from_json(folder.task).predicted_labels
    inventory = tags.UNIVERSAL if {*labels} <= {*tags.UNIVERSAL} else labels
    source = f'tagging adapter {folder.name!r} {content[:12]}'
    return tags.LoadedTagger(functools.partial(_tag_with, directory), inventory, source)


def _tag_with(directory: str, texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tag words with an adapter: a prediction like any other."""
    # The one look upwards: to tag is to predict, and prediction is built on what is built here.
    from adapters_jax.predict import predict

    rows = predict(directory, [{'tokens': list(words)} for words in texts])
    return [row['prediction'] for row in rows]


def check_task(kind: type[Task], steps: Chain) -> None:
    """Refuse steps for a task whose labels are of the very words that they would change.

    Raises:
        ValueError: naming both.
    """
    if steps and kind.reads != 'input_ids':
        raise ValueError(
            f'data.preprocess is {steps.names}, but {kind.name} has no texts; leave it empty'
        )
    if steps and not kind.takes_steps:
        raise ValueError(
            f'data.preprocess is {steps.names}, but the labels of {kind.name} belong to the words '
            'as they are; leave data.preprocess empty'
        )


def check_tags(method: Method, steps: Chain) -> None:
    """Refuse a method that reads tags that the chain does not give; say where it reads none.

    Raises:
        ValueError: no tags, or more of them than the method has vectors for.
    """
    wanted, given = method.known_tags, steps.num_tags
    if wanted and not given:
        raise ValueError(
            f'the method reads tags (tags={wanted}), but no step of data.preprocess gives any; add '
            "one, such as 'tags[spacy=en_core_web_sm]', or set tags=0"
        )
    if 0 < wanted < given:
        raise ValueError(
            f'the method has vectors for {wanted} tags (tags={wanted}), but data.preprocess gives '
            f'{given}, the one of words without a tag included; set tags={given}'
        )
    if given and not wanted:
        _LOG.warning(
            'data.preprocess tags the words, but the method %s looks at no tags; '
            'attention[tags=%d] and attention_side[tags=%d] do.',
            *(method.architecture, given, given),
        )


def check_members(folders: Mapping[str, AdapterFolder], steps: Chain) -> None:
    """Say where a finished adapter, now part of another, was trained on texts of another form."""
    for name, folder in folders.items():
        then = [str(step['step']) for step in folder.preprocess]
        if then != list(steps.names):
            _LOG.warning(
                'The adapter %r was trained with data.preprocess=%r, and now it is %r.',
                *(name, tuple(then), steps.names),
            )
