"""A small random torch model of every family, and our own of the same weights.

Weights are far from a fresh initialisation: attention is peaked, LayerNorms are not the identity,
and no comparison succeeds because all numbers are near zero.
"""

import dataclasses
import functools
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from adapters_jax.interop import decoder_heads
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.params import Tree

_ENCODER = {
    'vocab_size': 61,
    'hidden_size': 32,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'intermediate_size': 52,
    'max_position_embeddings': 40,
}
_STACKS = {
    'd_model': 32,
    'encoder_layers': 2,
    'decoder_layers': 3,
    'encoder_attention_heads': 4,
    'decoder_attention_heads': 4,
    'encoder_ffn_dim': 52,
    'decoder_ffn_dim': 52,
    'vocab_size': 61,
    'forced_eos_token_id': None,
}
_BART = _STACKS | {'max_position_embeddings': 40, 'scale_embedding': False}
_SPECIAL = {'pad_token_id': 1, 'bos_token_id': 0, 'eos_token_id': 2, 'decoder_start_token_id': 2}
_MARIAN = _BART | {
    'pad_token_id': 60,
    'bos_token_id': 0,
    'eos_token_id': 0,
    'decoder_start_token_id': 60,
    'scale_embedding': True,
    'activation_function': 'swish',
}
_T5 = {
    'd_model': 32,
    'd_kv': 8,
    'd_ff': 52,
    'num_layers': 3,
    'num_decoder_layers': 2,
    'num_heads': 4,
    'vocab_size': 61,
    'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 10,
    'decoder_start_token_id': 0,
}
_WHISPER = _STACKS | {
    'num_mel_bins': 10,
    'max_source_positions': 12,
    'max_target_positions': 40,
    'pad_token_id': 60,
    'bos_token_id': 58,
    'eos_token_id': 59,
    'decoder_start_token_id': 57,
}
_IMAGES = {
    'hidden_size': 32,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'intermediate_size': 52,
    'image_size': 12,
    'patch_size': 4,
}
_GATED = {'d_kv': 6, 'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}


def _two_berts(**options: Any) -> transformers.EncoderDecoderConfig:
    sizes = _ENCODER | {'num_hidden_layers': 2, 'attn_implementation': 'eager'}
    second = sizes | {'vocab_size': 55, 'max_position_embeddings': 30, 'num_hidden_layers': 3}
    options.pop('attn_implementation')
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**sizes), transformers.BertConfig(**second), **options
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A family's classes at `transformers`, and what its config is made with."""

    config: Any
    bare: type
    options: dict[str, Any]
    headed: type | None = None  # with scores of words

    @property
    def kind(self) -> str:
        """What it takes: 'text', 'pairs' of texts, 'sound' or 'images'."""
        name = self.config.__name__
        if 'Whisper' in name:
            return 'sound'
        if 'iT' in name:
            return 'images'
        return 'pairs' if self.headed else 'text'


_t = transformers
CASES = {
    'bert': Case(_t.BertConfig, _t.BertModel, _ENCODER),
    'roberta': Case(_t.RobertaConfig, _t.RobertaModel, _ENCODER),
    'distilbert': Case(
        _t.DistilBertConfig,
        _t.DistilBertModel,
        {'vocab_size': 61, 'dim': 32, 'n_layers': 3, 'n_heads': 4, 'hidden_dim': 52}
        | {'max_position_embeddings': 40},
    ),
    'electra': Case(_t.ElectraConfig, _t.ElectraModel, _ENCODER | {'embedding_size': 20}),
    'electra-even': Case(_t.ElectraConfig, _t.ElectraModel, _ENCODER | {'embedding_size': 32}),
    'bart': Case(_t.BartConfig, _t.BartModel, _BART | _SPECIAL, _t.BartForConditionalGeneration),
    'mbart': Case(
        _t.MBartConfig,
        _t.MBartModel,
        _BART | _SPECIAL | {'scale_embedding': True},
        _t.MBartForConditionalGeneration,
    ),
    'marian': Case(_t.MarianConfig, _t.MarianModel, _MARIAN, _t.MarianMTModel),
    't5': Case(_t.T5Config, _t.T5Model, _T5, _t.T5ForConditionalGeneration),
    't5-gated': Case(_t.T5Config, _t.T5Model, _T5 | _GATED, _t.T5ForConditionalGeneration),
    'whisper': Case(
        _t.WhisperConfig, _t.WhisperModel, _WHISPER, _t.WhisperForConditionalGeneration
    ),
    'encoder-decoder': Case(
        _two_berts,
        _t.EncoderDecoderModel,
        {'decoder_start_token_id': 4, 'pad_token_id': 0},
        _t.EncoderDecoderModel,
    ),
    'vit': Case(_t.ViTConfig, _t.ViTModel, _IMAGES),
    'vit-unbiased': Case(_t.ViTConfig, _t.ViTModel, _IMAGES | {'qkv_bias': False}),
    'deit': Case(_t.DeiTConfig, _t.DeiTModel, _IMAGES),
}
# Families much like another one (in order: bert, bart, bart, t5, vit, electra), which are compared
# with the libraries' in the slow tests: they differ in where norms stand, in a gate, in embeddings.
VARIANTS = ('roberta', 'mbart', 'marian', 't5-gated', 'deit', 'electra-even')


def marks(family: str, quick: bool) -> list[pytest.MarkDecorator]:
    """Return the marks of a comparison of a method: those over variants are slow tests."""
    return [] if quick and family not in VARIANTS else [pytest.mark.slow]


@functools.cache
def models(
    name: str, seed: int = 0, headed: bool = False
) -> tuple[torch.nn.Module, LoadedBackbone, Tree]:
    """Return a torch model in evaluation mode, and our backbone and head of its checkpoint."""
    case = CASES[name]
    config = case.config(**case.options, attn_implementation='eager')
    model = (case.headed if headed else case.bare)(config).eval()
    model.generation_config = transformers.GenerationConfig()
    randomise(model, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load_backbone(folder)
        return model, loaded, decoder_heads.read(loaded) if headed else {}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Set every parameter to random numbers: scales of norms around 1, all others around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # sines
                continue
            scale = 'norm' in name.lower() and name.endswith('weight')
            noise = torch.randn(parameter.shape, generator=generator)
            # T5 does not divide scores: its queries are small instead.
            noise = 0.2 * noise if name.endswith('.q.weight') else noise
            parameter.copy_(1 + 0.3 * noise if scale else 0.3 * noise)


def texts(rows: int, length: int, pad: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids [B, T], and which of them are no padding: each row's first ones."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 55, (rows, length))
    lengths = np.r_[length, rng.integers(1, length + 1, rows - 1)]
    real = np.arange(length) < lengths[:, None]
    return np.where(real, ids, pad).astype(np.int32), real


def inputs(name: str, rows: int = 3, seed: int = 0) -> np.ndarray:
    """Return pixels as torch takes them, [B, C, H, W], or features of sound, [B, M, F]."""
    rng = np.random.default_rng(seed)
    shape = (rows, 3, 12, 12) if CASES[name].kind == 'images' else (rows, 10, 24)
    return rng.standard_normal(shape).astype(np.float32)
