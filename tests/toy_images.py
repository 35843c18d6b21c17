"""Toy images and a toy ViT, as files on the disk: what whole runs of images are tried on."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import toy
from safetensors.numpy import save_file

from adapters_jax.config import Config
from adapters_jax.models import families
from adapters_jax.models.backbone import shapes
from adapters_jax.params import flatten, map_with_path
from configs import images as shipped
from experiments.toy import random_leaf

SIDE = 16
COLOURS = {'blue': (30, 40, 200), 'green': (30, 190, 40), 'red': (210, 30, 30)}


def write_vit(folder: Path, *, family: str = 'vit', layers: int = 2, seed: int = 0) -> str:
    """Write a random ViT as a checkpoint folder; return its name, for `config.backbone`."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = {
        'model_type': family,
        'hidden_size': 32,
        'num_hidden_layers': layers,
        'num_attention_heads': 2,
        'intermediate_size': 64,
        'image_size': SIDE,
        'patch_size': 8,
        'num_channels': 3,
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-6,
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
    }
    (folder / 'config.json').write_text(json.dumps(hf))
    config, rng = families.read_config(hf), np.random.default_rng(seed)
    leaves = flatten(map_with_path(lambda p, x: random_leaf(rng, p, x.shape), shapes(config)))
    tensors = {
        theirs: np.ascontiguousarray(leaves[ours].T if transposed else leaves[ours])
        for theirs, (ours, transposed) in families.tensor_names(config).items()
    }
    save_file(tensors, folder / 'model.safetensors')
    return str(folder)


def picture(colour: str, rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """Return noise with a patch of a colour somewhere, uint8 [side, side, 3]."""
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    top, left = rng.integers(0, side // 2, 2)
    image[top : top + side // 2, left : left + side // 2] = COLOURS[colour]
    return image


def encoded(pixels: np.ndarray, kind: str = 'PNG') -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def files(count: int, seed: int = 0, shuffled: bool = False) -> dict[str, bytes]:
    """Return image files by 'CLASS/NUMBER.png'; `shuffled` gives them classes by lot."""
    rng = np.random.default_rng(seed)
    names = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
    given = rng.permutation(names) if shuffled else names
    return {
        f'{label}/{i:04}.png': encoded(picture(name, rng))
        for i, (name, label) in enumerate(zip(names, given, strict=True))
    }


def write_set(folder: Path, train: int = 90, held_out: int = 30, shuffled: bool = False) -> str:
    """Write a set as folders of train, val and test; return its folder."""
    for number, (split, count) in enumerate(
        {'train': train, 'val': held_out, 'test': held_out}.items()
    ):
        own = shuffled and split == 'train'
        for name, content in files(count, number, own).items():
            path = folder / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return str(folder)


def write_tar(path: Path, contents: dict[str, bytes]) -> str:
    """Write a tar file; return its path."""
    with tarfile.open(path, 'w') as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def config(backbone: str, directory: str, method: str = 'pfeiffer', **changes: object) -> Config:
    """Return the shipped config for toy images: no cache, one device."""
    made = shipped.get_config(f'method={method},backbone={backbone}')
    made.data.dir = directory
    return toy.change(toy.settle(made), **changes)
