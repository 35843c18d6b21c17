"""What task, method and checkpoint agree on: what is read, whose head it is, who shares a row."""

import dataclasses
from typing import Any

import numpy as np

from adapters_jax.adapters import composed
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config
from adapters_jax.data import tokenize
from adapters_jax.data.encoded import TAGS, Encoded
from adapters_jax.interop import decoder_heads, language_heads
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.model import Model
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree
from adapters_jax.tasks.task import Encoding, Rows, Task


def choose_head(config: Config, task: Task, backbone: LoadedBackbone) -> HeadConfig:
    """Return the head that the config asks for as the task needs it.

    Raises:
        ValueError: one that is not to be trained, and that no checkpoint has.
    """
    head = task.head(HeadConfig(**config.head.to_dict()))
    there = head.scores_words and _has_head(backbone)
    if head.train == 'none' and not there:
        raise ValueError(
            "head.train is 'none', but the head does not come with the checkpoint, so it would "
            "stay as it is drawn; set head.train='auto'"
        )
    if not head.scores_words or head.train != 'auto':
        return head
    return dataclasses.replace(head, train='none' if there else 'all')


def check_input(task: Task, backbone: LoadedBackbone) -> None:
    """Refuse a backbone that reads something else than the task's examples are.

    Raises:
        ValueError: naming both.
    """
    given = backbone.config.reads
    if given != task.reads:
        raise ValueError(
            f'{task.name} is about {_INPUTS[task.reads][0]}, but the backbone {backbone.name!r} '
            f'({backbone.config.family}) reads {_INPUTS[given][0]}; set config.backbone to '
            f'{_INPUTS[task.reads][1]}'
        )


# What a backbone reads, and which backbones read it.
_INPUTS = {
    'input_ids': ('texts', 'a model of texts, such as minilm'),
    'pixels': ('images', 'a ViT or DeiT'),
    'sound': ('sound', 'a Whisper model'),
}


def smallest_batch(config: BackboneConfig) -> dict[str, Any]:
    """Return a batch of one row, to be traced."""
    batch: dict[str, Any] = dict.fromkeys(('starts', 'masked'), np.zeros((1, 1), np.int32))
    names = ['input_ids', 'token_type_ids', 'positions', 'segments', TAGS]
    if config.reads != 'input_ids':
        batch, names = batch | {config.reads: config.stem.example()}, []
    if config.decoder is not None:
        names += ['target_ids', 'target_positions', 'target_segments']
    return batch | dict.fromkeys(names, np.ones((1, 8), np.int32))


def tokenizer_of(backbone: LoadedBackbone) -> tokenize.Tokenizer | None:
    """Return a backbone's tokenizer; None where it reads no tokens."""
    if backbone.config.stem.reads != 'input_ids':
        return None
    return tokenize.load_tokenizer(backbone.directory)


def encode(task: Task, rows: Rows, encoding: Encoding, backbone: LoadedBackbone) -> Encoded:
    """Return what the task makes of rows for a backbone.

    Raises:
        ValueError: as the task does, or tokens of which the backbone knows nothing: where there is
            no vector JAX takes NaN.
    """
    found, config = task.encode(rows, encoding), backbone.config
    read, said = found.tokens.get('input_ids'), found.target.get('label')
    for ids, words in ((read, config.vocabulary), (said, config.written)):
        if ids is not None and ids.max(initial=-1) >= words:
            raise ValueError(
                f'the tokenizer makes the token {ids.max()}, but the backbone in '
                f'{backbone.directory} has {words} words (0 to {words - 1}); use the tokenizer '
                'that it came with, or a checkpoint whose embeddings were resized to yours'
            )
    return found


def check_undivided(method: Method) -> None:
    """Refuse a method that divides or copies batches, whose sizes vary in all commands.

    Raises:
        ValueError: it holds split, batch_split or parallel.
    """
    method.require(
        not method.divides,
        'split, batch_split and parallel divide or copy a batch of one size, and those of training '
        'and prediction vary: use stack, fuse or average, let each line name its adapter (predict '
        '--adapter=a=DIR,b=DIR), or call Model.apply on batches of your own',
    )


def check_texts(task: Task, model: Model) -> None:
    """Refuse a method that cannot do with several texts in a row where the task has them.

    Raises:
        ValueError: naming both.
    """
    if task.writes != (model.config.decoder is not None):
        raise ValueError(
            f'the task {task.name} {"writes texts" if task.writes else "writes no texts"}, but a '
            f'{model.config.family} backbone has {"no" if task.writes else "a"} decoder; choose '
            f'another backbone, or task.name={"classification" if task.writes else "seq2seq"!r}'
        )
    blocks = getattr(model.method, 'tree', None)
    kinds = {block.kind for block in composed.blocks_of(blocks)} if blocks else set()
    check_undivided(model.method)
    if model.head_config.scores_words and not task.writes and kinds - {'stack'}:
        raise ValueError(
            f'{task.name} under {model.method.expression}: what the adapters do to the embedded '
            'input must be undone before the output embeddings, which only stack(...) can; set '
            'config.method to one'
        )
    if task.several_texts and not model.method.packable:
        raise ValueError(
            f'an example of {task.name} is several texts in one row, but vectors that '
            f'{model.method.architecture} inserts would be common to all of them; choose a method '
            'without prompt_tuning'
        )


def with_published_head(tree: Tree, model: Model, backbone: LoadedBackbone) -> Tree:
    """Return fresh parameters with the checkpoint's language head, where the model has one."""
    if not model.head_config.scores_words or not _has_head(backbone):
        return tree
    return tree | {'heads': {model.name: _published(backbone)}}


def _has_head(backbone: LoadedBackbone) -> bool:
    """Tell whether scores of words come with the checkpoint."""
    if backbone.config.decoder is not None:
        own = backbone.config.decoder
        return (own.tied and not own.transformed) or decoder_heads.exists(backbone)
    return language_heads.exists(backbone)


def _published(backbone: LoadedBackbone) -> Tree:
    if backbone.config.decoder is not None:
        return decoder_heads.read(backbone)
    return language_heads.read(backbone)


def parameters(folder: AdapterFolder, backbone: LoadedBackbone, model: Model) -> Tree:
    """Return all parameters of the model that `bind` made of a finished adapter.

    Raises:
        ValueError: it was trained under a language head that the backbone's checkpoint lacks.
    """
    tree = folder.overlay(backbone.params, model.method.constants(model.config.dimensions))
    if model.head_config.train != 'none':
        return tree
    if not _has_head(backbone):
        raise ValueError(
            f'the adapter {folder.name!r} was trained under the language head of its checkpoint, '
            f'which {backbone.directory} does not have; use the whole checkpoint'
        )
    return tree | {'heads': {folder.name: _published(backbone)}}
