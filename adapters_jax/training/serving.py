"""Several finished adapters over one backbone: what predicts for lines that each name their own.

Adapters that can be chosen by row share one program (`adapters/bank`); the others, which change
whole matrices of the backbone, have one each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
from jaxtyping import Float

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.bank import BACKBONE, Bank
from adapters_jax.adapters.dropping import Dropped
from adapters_jax.config import Config
from adapters_jax.data.encoded import READ, Encoded, tokens_on_end
from adapters_jax.data.tokenize import Tokenizer
from adapters_jax.interop import adapter_folder, formats
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadBank, HeadConfig
from adapters_jax.tasks.task import Encoding, Task
from adapters_jax.training import (
    batching,
    dtypes,
    evaluation,
    experiment,
    fitting,
    inference,
    preprocessing,
)
from adapters_jax.training.placement import Placement
from adapters_jax.training.step import jit_outputs

Loaded = dict[str, tuple[AdapterFolder, LoadedBackbone]]


def load(directories: Mapping[str, str | Path], backbone: str = '') -> Loaded:
    """Return adapters of one backbone by name, each with it; its weights are in memory once.

    `backbone` is as in `formats.load`.

    Raises:
        FileNotFoundError: no adapter there, or no backbone.
        ValueError: a damaged folder, or adapters of different backbones; two of them are named.
    """
    found: Loaded = {}
    for name, directory in directories.items():
        first, (_, held) = next(iter(found.items()), ('', (None, None)))
        folder, own = formats.load(Path(directory), backbone, held=held)
        if held is not None:
            _check_same(first, held, name, own)
            own = dataclasses.replace(own, params=held.params)  # of a copy elsewhere, too
        found[name] = folder, own
    return found


def _check_same(first: str, held: LoadedBackbone, name: str, own: LoadedBackbone) -> None:
    if (own.fingerprint, own.architecture) != (held.fingerprint, held.architecture):
        raise ValueError(
            f'the adapters {first!r} and {name!r} are of different backbones '
            f'({held.describe()["name"]} and {own.describe()["name"]}); predict for each '
            'backbone by itself'
        )


def encode(
    rows: datasets.Dataset,
    task: Task,
    folder: AdapterFolder,
    loaded: LoadedBackbone,
    tokenizer: Tokenizer | None = None,
) -> Encoded:
    """Encode the rows of a task as a finished adapter was trained on them.

    `tokenizer` is the backbone's, where it is in memory already.

    Raises:
        ValueError: preprocessing that gives other tags than the adapter knows, or a tokenizer that
            gives other words than the backbone knows.
    """
    model, chain = experiment.bind(folder, loaded), preprocessing.chain_of(folder)
    preprocessing.check_tags(model.method, chain)
    tokenizer = fitting.tokenizer_of(loaded) if tokenizer is None else tokenizer
    encoding = Encoding(tokenizer, folder.max_length, model.text_positions, chain=chain)
    return fitting.encode(task, rows, encoding, loaded)


class Serving:
    """Finished adapters over one backbone, on their devices, and the programs they have there.

    From the layers `dropped` every adapter is left out (AdapterDrop).

    Raises:
        ValueError: an adapter whose parameters are not those of its method.
    """

    def __init__(
        self,
        adapters: Mapping[str, AdapterFolder],
        loaded: LoadedBackbone,
        config: Config,
        tasks: Mapping[str, Task],
        dropped: Dropped = 0,
    ) -> None:
        shared = {name: folder for name, folder in adapters.items() if can_share(folder)}
        groups = _groups(shared, tasks) if len(shared) > 1 else []
        held: inference.Held = {}
        self._routed = [
            _Routed({name: adapters[name] for name in names}, loaded, config, tasks, dropped, held)
            for names in groups
        ]
        grouped = {name for names in groups for name in names}
        self._alone = {
            name: inference.Applied(folder, loaded, config, tasks[name], dropped, held)
            for name, folder in adapters.items()
            if name not in grouped
        }

    def outputs(
        self, encoded: Mapping[str, Encoded], few: bool = False
    ) -> dict[str, Float[np.ndarray, 'N W']]:
        """Return, for each adapter with examples, the outputs for what is encoded for it.

        `few` is as in `Applied.outputs`.
        """
        found = {
            name: self._alone[name].outputs(own, few)
            for name, own in encoded.items()
            if name in self._alone
        }
        for routed in self._routed:
            own = {name: encoded[name] for name in routed.names if name in encoded}
            found |= routed.outputs(own, few) if own else {}
        return found


def _groups(adapters: Mapping[str, AdapterFolder], tasks: Mapping[str, Task]) -> list[list[str]]:
    """Return the names of adapters whose texts can lie in the same batches.

    Texts with and without vectors inserted among them are laid out in rows of their own; outputs
    are either of texts, of tokens or of several texts together. Images are prepared in one way.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, folder in adapters.items():
        task = tasks[name]
        packable = registry.from_json(folder.method).packable
        key = packable, task.layout
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def can_share(folder: AdapterFolder) -> bool:
    """Tell whether an adapter can be chosen by row."""
    if HeadConfig.from_json(folder.head).scores_words:
        return False
    try:
        Bank(members={folder.name: registry.from_json(folder.method)})
    except ValueError:
        return False
    return True


def bank_of(
    adapters: Mapping[str, AdapterFolder], loaded: LoadedBackbone, dropped: Dropped = 0
) -> tuple[Model, params.Tree]:
    """Return the model that holds all these adapters, and its parameters, stacked.

    Raises:
        ValueError: an adapter whose parameters are not those of its method.
    """
    own, heads, kinds = {}, {}, []
    for name, folder in adapters.items():
        single = experiment.bind(folder, loaded, dropped=dropped)
        described = jax.eval_shape(single.init, jax.random.key(0), loaded.params)
        adapter_folder.check_leaves(folder, *params.partition(described, single.rules))
        constants = single.method.constants(loaded.config.dimensions)
        whole = folder.overlay(loaded.params, constants)
        copies = {BACKBONE: folder.backbone_params} if folder.backbone_params else {}
        own[name] = whole['adapters'].get(folder.name, {}) | copies
        heads[name] = folder.head_params
        kinds.append((name, single.head_config, single.outputs))
    bank = Bank(members={name: registry.from_json(f.method) for name, f in adapters.items()})
    one_for_each = HeadBank(tuple(kinds))
    model = Model(loaded.config, bank, HeadConfig(), 1, dropped=dropped, heads=one_for_each)
    tree = {
        'backbone': loaded.params,
        'adapters': {model.name: bank.stack(own)},
        'heads': {model.name: heads},
    }
    return model, tree


class _Routed:
    """Adapters that are chosen by row, and the program that they have in common."""

    def __init__(
        self,
        adapters: Mapping[str, AdapterFolder],
        loaded: LoadedBackbone,
        config: Config,
        tasks: Mapping[str, Task],
        dropped: Dropped,
        held: inference.Held,
    ) -> None:
        model, tree = bank_of(adapters, loaded, dropped)
        self.names, self._config, self._tasks = tuple(adapters), config, tasks
        self._model = dataclasses.replace(model, dtype=dtypes.choose_dtype(config))
        self._placement = Placement.of(config)
        frozen = {'backbone': tree['backbone']}
        own = {name: branch for name, branch in tree.items() if name not in frozen}
        backbone = inference.placed_once(frozen, self._placement, config, held)
        self._placed = backbone | self._placement.trainable(own)
        self._task = tasks[self.names[0]]  # of one kind with the others in what it needs
        self._forward = jit_outputs(self._model, self._task)

    def outputs(self, encoded: Mapping[str, Encoded], few: bool) -> dict[str, np.ndarray]:
        """Return the outputs of each adapter that has examples."""
        joined = join(encoded, self.names)
        per_token, placement = self._model.heads.per_token, self._placement
        parts = placement.row_parts
        policy = batching.choose_forward(self._config, self._model, joined.sizes, parts, few)
        given = self._placed, joined, policy, self._model.config.pad_id, placement.mesh
        found = evaluation.outputs(
            self._forward, {}, *given, per_token=per_token, transform=self._task.transform
        )
        own = encoded.values()
        sizes = [one.offsets[-1] if per_token else len(one) for one in own]
        split = np.split(found, np.cumsum(sizes)[:-1])
        return {
            name: part[:, : self._tasks[name].width(one)]
            for (name, one), part in zip(encoded.items(), split, strict=True)
        }


def join(encoded: Mapping[str, Encoded], names: Sequence[str]) -> Encoded:
    """Return the examples of several sets on end; `adapter` numbers the names of the sets."""
    parts = list(encoded.values())
    lengths = np.concatenate([part.lengths for part in parts])
    numbers = np.array([names.index(name) for name in encoded], np.int32)
    inputs = {
        name: np.concatenate([part.examples[name] for part in parts])
        for name in READ
        if name in parts[0].examples
    }
    return Encoded(
        tokens=tokens_on_end(parts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        examples=inputs | {'adapter': np.repeat(numbers, [len(part) for part in parts])},
    )
