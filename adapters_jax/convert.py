"""Turn a finished adapter into another format, or merge it into its backbone.

    python -m adapters_jax.convert --source=DIR --target=DIR --format=FORMAT [--backbone=NAME]

The source is an adapter of this project, of AdapterHub or of PEFT; which, is found out. FORMAT is

- adapters_jax: this project's folder;
- adapterhub: what `model.load_adapter(DIR, use_safetensors=True)` of `adapters` reads;
- peft: what `PeftModel.from_pretrained(model, DIR)` of `peft` reads;
- merged: the backbone with the adapter merged into it, as a Hugging Face directory that
  `transformers` reads (LoRA, DoRA, VeRA, (IA)3, AdaLoRA, MTL-LoRA, BitFit, LayerNorm tuning).
"""

from pathlib import Path

from absl import flags

from adapters_jax import entry
from adapters_jax.interop import formats


def convert(source: str | Path, target: str | Path, format: str, backbone: str = '') -> Path:
    """Write the adapter in `source` to the folder `target`, and return it.

    `backbone` replaces the name that the source gives, for a copy elsewhere.

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
    folder, loaded = formats.load(Path(source), backbone)
    return formats.save(folder, target, loaded, format)


def main(source: str, target: str, format: str, backbone: str) -> None:
    """Convert, and say what was written."""
    written = convert(source, target, format, backbone)
    print(f'wrote {written} ({format}): {", ".join(sorted(p.name for p in written.iterdir()))}')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'source': flags.DEFINE_string('source', None, 'Folder of a finished adapter.'),
        'target': flags.DEFINE_string('target', None, 'Folder to write.'),
        'format': flags.DEFINE_string('format', None, f'One of {", ".join(formats.FORMATS)}.'),
        'backbone': flags.DEFINE_string('backbone', '', 'The backbone, if not where it was.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
