"""A small Whisper as a checkpoint folder, and recordings of tones that have names."""

import json
from pathlib import Path

import numpy as np
import soundfile
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

END, START, SILENT = '<|endoftext|>', '<|startoftranscript|>', '<|notimestamps|>'
SPECIAL = [END, START, SILENT, '<|de|>', '<|transcribe|>', '<|translate|>']
NAMES = ['low', 'high']
RATE = 8000


def write_backbone(folder: Path, seed: int = 0, multilingual: bool = False) -> str:
    """Write a random model of 10 bands and 0.4 seconds; return its name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges()
    words = [*SPECIAL, *letters, *(''.join(pair) for pair in merges)]
    ids = {word: number for number, word in enumerate(words)}
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=len(ids),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=10,
        max_source_positions=20,
        max_target_positions=12,
        init_std=0.1,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    generation = {'is_multilingual': multilingual, 'suppress_tokens': [3, 4, 5]}
    generation |= {'begin_suppress_tokens': [0], 'decoder_start_token_id': 1, 'eos_token_id': 0}
    (folder / 'generation_config.json').write_text(json.dumps(generation))
    extractor = transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=1)
    extractor.save_pretrained(folder)
    _write_tokenizer(folder, ids, merges)
    return str(folder)


def _write_tokenizer(folder: Path, ids: dict[str, int], merges: list[tuple[str, str]]) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'{START} {SILENT} $A {END}',
        special_tokens=[(START, 1), (SILENT, 2), (END, 0)],
    )
    tokenizer.save(str(folder / 'tokenizer.json'))
    special = dict.fromkeys(('bos_token', 'eos_token', 'pad_token', 'unk_token'), END)
    settings = {'tokenizer_class': 'WhisperTokenizer', **special}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def _merges() -> list[tuple[str, str]]:
    """Return how the names are put together, letter by letter, with the space before them."""
    wholes = [f'Ġ{name}' for name in NAMES]
    return [(whole[:end], whole[end]) for whole in wholes for end in range(1, len(whole))]


def write_task(folder: Path, rows: int = 64, seed: int = 0) -> str:
    """Write tones, of which the low ones are called so, and tables of them."""
    rng = np.random.default_rng(seed)
    for split, count in (('train', rows), ('validation', 16), ('test', 16)):
        (folder / split).mkdir(parents=True)
        lines = ['audio\ttext\n']
        for i in range(count):
            name = NAMES[i % 2]
            hertz = rng.uniform(200, 400) if name == 'low' else rng.uniform(2000, 3000)
            times = np.arange(round(rng.uniform(0.2, 0.35) * RATE)) / RATE
            sound = 0.3 * np.sin(2 * np.pi * hertz * times) + 0.01 * rng.standard_normal(len(times))
            soundfile.write(folder / split / f'{i}.wav', sound, RATE)
            lines.append(f'{split}/{i}.wav\t{name}\n')
        (folder / f'{split}.tsv').write_text(''.join(lines))
    return str(folder)
