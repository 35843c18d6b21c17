"""Turn a finished adapter into another format, or merge it into its backbone.

    python -m adapters_jax.convert --source=DIR --target=DIR --format=FORMAT [--backbone=NAME]
        [--members=a=DIR,b=DIR] [--keep=a,b] [--name=NAME]

The source is an adapter of this project, of AdapterHub or of PEFT; which, is found out. FORMAT is

- adapters_jax: this project's folder;
- adapterhub: what `model.load_adapter(DIR, use_safetensors=True)` of `adapters` reads;
- peft: what `PeftModel.from_pretrained(model, DIR)` of `peft` reads;
- merged: the backbone with the adapter merged into it, as a Hugging Face directory that
  `transformers` reads (LoRA, DoRA, VeRA, DVoRA, (IA)3, AdaLoRA, MTL-LoRA, BitFit, LayerNorm
  tuning).

A fusion that `adapters` saved alone finds its adapters beside it by their names; those that lie
elsewhere are given as --members. With --keep an AdapterFusion mixes only the adapters named there
from now on; the others are left out of the target (Rücklé et al. 2021, section 4). With --name the
adapter is called so in the target.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
from absl import flags

from adapters_jax import entry
from adapters_jax.adapters import pruning, registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.config import named_items
from adapters_jax.interop import adapter_folder, formats
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import partition
from adapters_jax.training.experiment import task_of


def convert(
    source: str | Path,
    target: str | Path,
    format: str,
    backbone: str = '',
    members: Mapping[str, str | Path] | None = None,
    keep: Collection[str] = (),
    name: str = '',
) -> Path:
    """Write the adapter in `source` to the folder `target`, and return it.

    `backbone` replaces the name that the source gives, for a copy elsewhere. `members` are the
    folders of a fusion's adapters by name. `keep` names the adapters that fusions still mix; none
    means all. `name` is what the adapter is called in the target; its own name unless given.

    Raises:
        FileExistsError: the target exists and is not empty.
        FileNotFoundError: no adapter there, or no backbone.
        ValueError: an unknown format, a damaged source, or an adapter that the format has no place
            for; what is in the way is named.
    """
    target = Path(target)
    formats.check_format(format)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f'--target: {target} exists already; expected a new or empty folder')
    folder, loaded = formats.load(Path(source), backbone, members, name)
    _check_leaves(folder, loaded)
    folder = _pruned(folder, keep) if keep else folder
    return formats.save(folder, target, loaded, format)


def _check_leaves(folder: AdapterFolder, loaded: LoadedBackbone) -> None:
    """Refuse an adapter that lacks leaves: it would be written without them."""
    has_task = bool(folder.task)
    model = Model(
        config=loaded.config,
        method=registry.from_json(folder.method),
        head_config=HeadConfig.from_json(folder.head if has_task else {}),
        outputs=task_of(folder).num_outputs if has_task else 1,
        name=folder.name,
    )
    described = jax.eval_shape(model.init, jax.random.key(0), loaded.params)
    if not has_task:  # nor, perhaps, a head, or one of which it is not known what it scores
        folder, described = dataclasses.replace(folder, head={}), {**described, 'heads': {}}
    adapter_folder.check_leaves(folder, *partition(described, model.rules))


def _pruned(folder: AdapterFolder, keep: Collection[str]) -> AdapterFolder:
    method = registry.from_json(folder.method)
    if not isinstance(method, Composed):
        raise ValueError(
            f'--keep names adapters of a fusion, but {folder.name!r} is one adapter '
            f'({method.architecture})'
        )
    smaller, tree = pruning.prune(method, folder.adapter_params, keep)
    return dataclasses.replace(folder, method=smaller.to_json(), adapter_params=tree)


def main(
    source: str, target: str, format: str, backbone: str, members: str, keep: str, name: str
) -> None:
    """Convert, and say what was written."""
    kept = [name.strip() for name in keep.split(',') if name.strip()]
    given = named_items(members, '--members')
    written = convert(source, target, format, backbone, given, kept, name)
    print(f'wrote {written} ({format}): {", ".join(sorted(p.name for p in written.iterdir()))}')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'source': flags.DEFINE_string('source', None, 'Folder of a finished adapter.'),
        'target': flags.DEFINE_string('target', None, 'Folder to write.'),
        'format': flags.DEFINE_string('format', None, f'One of {", ".join(formats.FORMATS)}.'),
        'backbone': flags.DEFINE_string('backbone', '', 'Where the backbone is, if it has moved.'),
        'members': flags.DEFINE_string('members', '', 'Adapters of a lone fusion: a=DIR,b=DIR.'),
        'keep': flags.DEFINE_string('keep', '', 'Keep only these adapters of a fusion: a,b.'),
        'name': flags.DEFINE_string('name', '', 'What the adapter is called from now on.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
