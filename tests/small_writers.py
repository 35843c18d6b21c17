"""A small encoder-decoder as a checkpoint folder, with a tokenizer of words, for tests of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

from adapters_jax.config import assign
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.models import families
from adapters_jax.models.backbone import shapes
from adapters_jax.params import flatten
from adapters_jax.train import train

WORDS = [f'w{i}' for i in range(20)]
SPECIAL = ['<s>', '<pad>', '</s>', '<unk>']
HF = {
    'model_type': 'bart',
    'architectures': ['BartForConditionalGeneration'],
    'vocab_size': len(SPECIAL) + len(WORDS),
    'd_model': 32,
    'encoder_layers': 1,
    'decoder_layers': 1,
    'encoder_attention_heads': 4,
    'decoder_attention_heads': 4,
    'encoder_ffn_dim': 64,
    'decoder_ffn_dim': 64,
    'max_position_embeddings': 40,
    'pad_token_id': 1,
    'bos_token_id': 0,
    'eos_token_id': 2,
    'decoder_start_token_id': 2,
    'dropout': 0.0,
}


def write_backbone(folder: Path, seed: int = 0, **changes) -> str:
    """Write a random model; return its name, for `config.backbone`."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = HF | changes
    (folder / 'config.json').write_text(json.dumps(hf))
    config, rng = families.read_config(hf), np.random.default_rng(seed)
    expected = {path: leaf.shape for path, leaf in flatten(shapes(config)).items()}
    tensors = {}
    for theirs, (ours, transposed) in families.tensor_names(config).items():
        shape = expected[ours][::-1] if transposed else expected[ours]
        scale = 1.0 if ours.endswith('scale') else 0.0
        wide = 0.3 if 'word' in ours else 0.1
        leaf = scale + (not scale) * wide * rng.standard_normal(shape)
        tensors[f'model.{theirs}'] = np.ascontiguousarray(leaf, dtype=np.float32)
    save_file(tensors, folder / 'model.safetensors')
    _write_tokenizer(folder)
    return str(folder)


def _write_tokenizer(folder: Path) -> None:
    ids = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)]
    )
    tokenizer.save(str(folder / 'tokenizer.json'))
    names = {'bos_token': '<s>', 'pad_token': '<pad>', 'eos_token': '</s>', 'unk_token': '<unk>'}
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', **names}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def changed(config, settings, **changes):
    """Return a config with settings by their keys, and changes that name keys with `__`."""
    settings |= {key.replace('__', '.'): value for key, value in changes.items()}
    for key, value in settings.items():
        assign(config, key, str(value))
    return config


def write_task(folder: Path, rows: int = 400, seed: int = 0) -> str:
    """Write a task: each text backwards; 4 to 7 words; files by language."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count in (('train', rows), ('val', 40), ('test', 40)):
        texts = [list(rng.choice(WORDS, rng.integers(4, 8))) for _ in range(count)]
        for language, own in (('xx', texts), ('yy', [text[::-1] for text in texts])):
            lines = ''.join(' '.join(text) + '\n' for text in own)
            (folder / f'{split}.{language}').write_text(lines)
    return str(folder)


def only_the_adapter_is_trained(config, workdir: Path, rel: float) -> None:
    """Train, and check what is kept of it, and that it scores as it did while training."""
    summary = train(config, workdir)
    kept = adapter_folder.load(workdir / 'adapter')
    assert summary['trainable_parameters'] < summary['total_parameters']
    of_backbone = config.method in ('bitfit', 'houlsby')
    assert not kept.head_params and of_backbone == bool(kept.backbone_params)
    metrics = evaluate(workdir, 'validation')['metrics']
    assert metrics == pytest.approx(summary['metrics']['validation'], rel=rel)
