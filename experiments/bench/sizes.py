"""The same adapter and head on disk: our folder against those of `adapters` and `peft`.

Both sides hold as many parameters, fresh ones, in float32; all files of a folder count. What a file
takes does not change from round to round, so there is one.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree, flatten, partition
from experiments.bench import backbones, libraries, programs
from experiments.bench.race import Race
from experiments.bench.timing import Times

UNIT = 'kB'  # of 1000 bytes
# Method of ours, library, size of theirs, and the head that the library saves with it: `peft` that
# of transformers, a linear layer on what the checkpoint's own pooler makes of the first token.
COURSES = (
    ('double_seq_bn[size=24]', 'adapters', 24, programs.HEAD),
    ('pfeiffer[size=24]', 'adapters', 24, programs.HEAD),
    ('lora[r=8]', 'peft', 8, HeadConfig(pooling='pooler')),
)


def races(root: Path) -> Iterator[Race]:
    """Race for the smaller folder, on MiniLM."""
    for course in COURSES:
        yield race('minilm', *course, root)


def race(backbone: str, method: str, library: str, size: int, head: HeadConfig, root: Path) -> Race:
    """Write the adapter of both sides and compare their bytes.

    Raises:
        RuntimeError: one of them holds more parameters than the other.
    """
    folder = backbones.folder(backbone, root)
    loaded, classes = load_backbone(str(folder)), len(programs.TASK.labels)
    model, params = programs.make(loaded, method, head=head)
    trained = partition(params, model.rules)[0]
    theirs = libraries.make(library, folder, method, size, classes)
    counts = {
        'ours': sum(leaf.size for leaf in flatten(trained).values()),
        'theirs': sum(leaf.numel() for leaf in theirs.parameters() if leaf.requires_grad),
    }
    if counts['ours'] != counts['theirs']:
        raise RuntimeError(
            f'{method} and its head are {counts["ours"]:,} parameters of ours and '
            f'{counts["theirs"]:,} of {library}; expected as many: give both the same sizes'
        )
    with tempfile.TemporaryDirectory() as place:
        ours = adapter_folder.save(described(model, trained, loaded), Path(place) / 'ours')
        sizes = {
            'ours': bytes_of(ours),
            'theirs': bytes_of(libraries.save(library, theirs, Path(place) / 'theirs')),
        }
    kilobytes = (Times((sum(sizes[side].values()) / 1000,)) for side in sizes)
    settings = {'backbone': backbone, 'method': method, 'library': library, 'size': size}
    settings |= {'head': head.to_json(), 'parameters': counts['ours'], 'dtype': 'float32'}
    title = f'{method} and head on {backbone}, {library}'
    return Race(title, *kilobytes, settings, unit=UNIT, more={'files': sizes})


def described(model: Model, trained: Tree, loaded: LoadedBackbone) -> AdapterFolder:
    """Return trained leaves as the finished adapter that a run writes of them."""
    return AdapterFolder(
        name=model.name,
        method=model.method.to_json(),
        head=model.head_config.to_json(),
        task=programs.TASK.to_json(),
        backbone=loaded.describe(),
        max_length=128,
        pair=False,
        adapter_params=trained['adapters'][model.name],
        head_params=trained['heads'][model.name],
    )


def bytes_of(folder: Path) -> dict[str, int]:
    """Return the bytes of every file in or below a folder, by its path there."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
