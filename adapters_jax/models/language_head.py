"""The head of a masked language model: from hidden states to scores of words.

It is the one that BERT and RoBERTa are pretrained under (Devlin et al. 2019, task 1): a dense
layer, the activation and a LayerNorm, then the product with the word embeddings themselves, and a
bias for each word. Scores are computed in the asked places only: over all tokens they would be
larger than the whole forward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from adapters_jax import functional, quantize
from adapters_jax.models.backbone import BackboneConfig, Decoder

Tree = dict[str, Any]
Undo = Callable[[Float[Array, 'B M D']], Float[Array, 'B M D']]


def init(key: PRNGKeyArray, hidden: int, width: int, vocabulary: int) -> Tree:
    """Return fresh parameters; the word embeddings, of that width, are the backbone's."""
    return {
        'transform': {
            'kernel': 0.02 * jax.random.normal(key, (hidden, width)),
            'bias': jnp.zeros(width),
        },
        'norm': {'scale': jnp.ones(width), 'bias': jnp.zeros(width)},
        'words': {'bias': jnp.zeros(vocabulary)},
    }


def apply(
    params: Mapping[str, Any],
    hidden: Float[Array, 'B T D'],
    places: Int[Array, 'B M'],
    table: Float[Array, 'V W'] | quantize.Quantized,
    config: BackboneConfig,
    undo: Undo = lambda x: x,
) -> Float[Array, 'B M V']:
    """Return the logits of every word in M places of each row, in float32.

    `table` is the backbone's word embeddings; `undo` takes back what an adapter did to the embedded
    input, which these vectors stand for (Pfeiffer et al. 2020, section 3.3).
    """
    x = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    # Some heads have their own activation, whatever their config says of the blocks.
    own = config.family in ('roberta', 'electra')
    name = 'gelu' if own else config.block.activation
    x = undo(_transformed(params, x, name, config.block.norm_epsilon))
    scores = quantize.against_rows(x.astype(hidden.dtype), table)
    return scores + params['words']['bias'].astype(jnp.float32).reshape(1, 1, -1)


def _transformed(
    params: Mapping[str, Any], x: Float[Array, 'B M D'], activation: str, epsilon: float
) -> Float[Array, 'B M D']:
    x = functional.dense(x.astype(jnp.float32), **params['transform'])
    x = functional.activation(activation)(x)
    return functional.layer_norm(x, params['norm']['scale'], params['norm']['bias'], epsilon)


def init_of_decoder(key: PRNGKeyArray, hidden: int, vocabulary: int, decoder: Decoder) -> Tree:
    """Return a decoder's own scores of words: nothing where they are products with its words."""
    if decoder.transformed:
        return init(key, hidden, hidden, vocabulary)
    if decoder.tied:
        return {}
    return {'words': {'kernel': 0.02 * jax.random.normal(key, (hidden, vocabulary))}}


def apply_to_decoder(
    params: Mapping[str, Any],
    hidden: Float[Array, 'B T D'],
    table: Float[Array, 'V D'] | quantize.Quantized,
    decoder: Decoder,
) -> Float[Array, 'B T V']:
    """Return the logits of every word in every place, in float32.

    `params` may have `words/kernel` instead of the table, and `words/bias`; of a head like BERT's
    they are what `init` makes.
    """
    own = params.get('words', {})
    if decoder.transformed:
        block = decoder.block
        x = _transformed(params, hidden, block.activation, block.norm_epsilon)
        hidden = x.astype(hidden.dtype)
    hidden = hidden * decoder.scale
    if 'kernel' in own:
        given = hidden, own['kernel'].astype(hidden.dtype)
        scores = jnp.einsum('BTD,DV->BTV', *given, preferred_element_type=jnp.float32)
    else:
        scores = quantize.against_rows(hidden, table)
    if 'bias' in own:
        scores = scores + own['bias'].astype(jnp.float32).reshape(1, 1, -1)
    return scores


def for_few_places(
    params: Mapping[str, Any], table: Float[Array, 'V D'] | quantize.Quantized
) -> Tree:
    """Return a decoder's parameters with its words' vectors as a matrix of their own.

    XLA's CPU compiler turns a large table around for each product with it, which takes fifteen
    times as long as the product itself where there are few places: once is enough.
    """
    own = params.get('words', {})
    if 'kernel' in own:
        return dict(params)
    turned = jax.lax.optimization_barrier(quantize.dequantize(table).T)
    return dict(params) | {'words': dict(own) | {'kernel': turned}}
