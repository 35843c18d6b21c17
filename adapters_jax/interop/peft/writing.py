"""One of our adapters as a PEFT folder."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax import files, params
from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.tuning import BitFit, LayerNormTuning
from adapters_jax.adapters.union import Union
from adapters_jax.adapters.vera import VeRA
from adapters_jax.interop import decoder_heads, hf_heads, hub, modules
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.peft import (
    adalora,
    configs,
    heads,
    lora,
    names,
    places,
    prompts,
    tensors,
    tuned,
    vectors,
)
from adapters_jax.interop.peft.tensors import Tensors
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.bert import BertStem
from adapters_jax.models.text import TextStem

_LOG = logging.getLogger(__name__)

# The PEFT type and the writer of each method.
_WRITERS: dict[str, tuple[type[Method], str, Callable[..., tuple[dict[str, Any], Tensors]]]] = {
    cls.architecture: (cls, kind, write)
    for cls, kind, write in (
        (LoRA, 'LORA', lora.write_lora),
        (DoRA, 'LORA', lora.write_lora),
        (AdaLoRA, 'ADALORA', adalora.write_adalora),
        (VeRA, 'VERA', vectors.write_vera),
        (IA3, 'IA3', vectors.write_ia3),
        (PrefixTuning, 'PREFIX_TUNING', prompts.write_prefix),
        (PromptTuning, 'PROMPT_TUNING', prompts.write_prompt),
    )
}
_TUNING = (BitFit.architecture, LayerNormTuning.architecture)


def save(folder: AdapterFolder, directory: Path | str, loaded: LoadedBackbone) -> Path:
    """Write an adapter of `loaded` as a PEFT folder.

    A head that no Hugging Face model has is left out, with a warning; so are the labels' names,
    which have no place in the format.

    Raises:
        ValueError: a method, a mix of methods or an option that PEFT does not have; the sentence
            says what to do instead.
    """
    directory = Path(directory)
    main = _main_member(folder.method)
    classifier = _classifier(folder, loaded)
    # A decoder is used with scores of words, which are no part of a folder.
    bare = classifier is None and loaded.config.decoder is None
    prefix = '' if bare else modules.prefix(loaded.config)
    kind, settings, own = _write_method(main, folder, loaded.config, prefix)
    task_type = _task_type(classifier, folder, loaded)
    leaves = params.flatten(folder.backbone_params)
    more, whole, backbone = tuned.write(
        kind, leaves, loaded.params, loaded.config, prefix, task_type
    )
    if classifier and any(names.POOLER in name for name in classifier):
        whole.append(tuned.POOLER)
    config = configs.write(
        kind,
        **settings | more,
        base_model_name_or_path=hub.published_name(loaded.name),
        modules_to_save=[*whole, *(heads.stored(task_type) if classifier else ())] or None,
        task_type=task_type,
    )
    outer = 'base_model.' if prompts.STORED in own else 'base_model.model.'
    named = _named(own | backbone, classifier or {}, outer, prefix)
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        (temporary / configs.CONFIG).write_text(json.dumps(config, indent=2) + '\n', 'utf-8')
        tensors.write(temporary / tensors.SAFETENSORS, named)
    if classifier:
        _warn_of_labels(folder)
    return directory


def _main_member(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the one member that PEFT has a type for.

    Raises:
        ValueError: a method, or a mix of methods, that it does not have.
    """
    union = method['architecture'] == Union.architecture
    members = list(method['members']) if union else [dict(method)]
    main = [m for m in members if m['architecture'] not in _TUNING]
    foreign = [m['architecture'] for m in main if m['architecture'] not in _WRITERS]
    if foreign:
        raise ValueError(
            f'PEFT has nothing like {", ".join(foreign)}; --format=adapterhub has more methods, '
            "or keep the adapter in this project's own format"
        )
    if len(main) > 1:
        raise ValueError(
            f'a PEFT folder holds one method, and not {" and ".join(_names_of(main))}; try '
            "--format=merged or --format=adapterhub, or keep it in this project's own format"
        )
    if main:
        return main[0]
    if _names_of(members) == [LayerNormTuning.architecture]:
        return members[0]
    raise ValueError(
        f'PEFT trains biases only beside an adapter such as lora; this one is '
        f'{" and ".join(_names_of(members))}; write it with --format=merged'
    )


def _names_of(members: Iterable[Mapping[str, Any]]) -> list[str]:
    return [member['architecture'] for member in members]


def _write_method(
    main: Mapping[str, Any], folder: AdapterFolder, config: BackboneConfig, prefix: str
) -> tuple[str, dict[str, Any], Tensors]:
    values = dict(main)
    architecture = values.pop('architecture')
    if architecture == LayerNormTuning.architecture:
        return 'LN_TUNING', {}, {}
    cls, kind, write = _WRITERS[architecture]
    tree = folder.adapter_params
    if folder.method['architecture'] == Union.architecture:
        tree = tree.get(architecture, {})
    arguments = (prefix,) if kind == 'ADALORA' else ()
    method = cls.from_fields(values)
    places.refuse_gates(method)
    settings, own = write(method, tree, config, *arguments)
    return kind, settings, own


def _task_type(
    classifier: Tensors | None, folder: AdapterFolder, loaded: LoadedBackbone
) -> str | None:
    """Return PEFT's kind of task; it has none for images and sound."""
    if not isinstance(loaded.config.stem, BertStem | TextStem):
        return None
    if loaded.config.decoder is not None:
        return heads.TEXTS
    if not classifier:
        return heads.FEATURES
    of_tokens = {task: kind for kind, task in heads.OF_TOKENS.items()}
    return of_tokens.get(folder.task['name'], heads.CLASSIFICATION)


def _warn_of_labels(folder: AdapterFolder) -> None:
    """Say that the names of the labels are left out, and which numbers stand for them."""
    labels = [str(label) for label in folder.task.get('labels', ())]
    if labels and labels != heads.numbered(len(labels)):
        _LOG.warning(
            "the names of the labels have no place in PEFT's folders: 0 to %d stand for %s, in "
            'this order; --format=adapterhub, merged and adapters_jax keep them',
            *(len(labels) - 1, ', '.join(labels)),
        )


def _warn_of_words(folder: AdapterFolder, loaded: LoadedBackbone) -> None:
    """Say that trained scores of words are left out."""
    own, head = decoder_heads.optional(loaded), params.flatten(folder.head_params)
    published = params.flatten(own or {})
    same = head.keys() <= published.keys() and all(
        np.array_equal(x, published[path]) for path, x in head.items()
    )
    if not same:
        _LOG.warning(
            'the adapter %r is written without the scores of words that were trained with it, for '
            "which PEFT's folders have no place here: --format=adapterhub, merged and adapters_jax "
            'keep them',
            folder.name,
        )


def _classifier(folder: AdapterFolder, loaded: LoadedBackbone) -> Tensors | None:
    config = loaded.config
    if not folder.head:
        return None
    if config.decoder is not None:
        _warn_of_words(folder, loaded)
        return None
    name = folder.task.get('name')
    tasks = (*hf_heads.PROBLEMS, *hf_heads.OF_TOKENS)
    if name not in tasks:
        _LOG.warning(
            'the adapter is written without its head: a classifier for PEFT is one of %s, and not '
            'of %s',
            ', '.join(tasks),
            name,
        )
        return None
    if name == 'multi_label':
        _LOG.warning(
            'a PEFT folder does not say that several classes may hold at once: load the model '
            "under it with problem_type='multi_label_classification'"
        )
    classifier = hf_heads.write(folder.head, folder.head_params, config, name)
    if classifier is None:
        _LOG.warning(
            'no Hugging Face model has the head of this adapter (pooling=%r, layers=%d); it is '
            'written without it; expected %s',
            folder.head['pooling'],
            folder.head['layers'],
            hf_heads.equivalent(config.family, name),
        )
    return classifier


_ENDINGS = ('.lora_', '.vera_', '.ia3_')


def _named(own: Tensors, classifier: Tensors, outer: str, prefix: str) -> Tensors:
    """Return the tensors under the names that PEFT gives them."""
    found = {}
    # PEFT puts a wrapper around what it adapts, and the bias is in there.
    adapted = {name.partition(end)[0] for name in own for end in _ENDINGS if end in name}
    for name, tensor in (own | classifier).items():
        module = name.removesuffix('.bias')
        name = f'{module}.base_layer.bias' if module in adapted else name
        if name == prompts.STORED:
            found[name] = tensor
        elif name in tensors.WHOLE['VERA']:
            found[f'base_model.{name}'] = tensor
        elif hf_heads.is_head(name):
            found[outer + name] = tensor
        else:
            found[f'{outer}{prefix}{name}'] = tensor
    return found
