"""Run by test_production.py in a process of its own, with XLA's flags as users have them.

Prints, as JSON, by how much the real MiniLM differs from transformers' BertModel, by how much
logits change when an adapter that starts at zero is put in, by how much hidden states do when the
weights are stored in fewer bits, and the bytes of a step's temporaries.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from adapters_jax import quantize
from adapters_jax.adapters import registry
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.model import Model, attention_mask
from adapters_jax.models.backbone import LAYOUTS, Backbone, BackboneConfig
from adapters_jax.models.block import REMAT
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import map_with_path
from adapters_jax.sharding import make_mesh
from adapters_jax.training.placement import Placement
from experiments.bench import memory

AT_ZERO = (
    'houlsby[init_weights="zero"]',
    'pfeiffer[init_weights="zero"]',
    'par_bn',
    'double_seq_bn[init_weights="zero"]',
    'adapter_plus[init_weights="zero"]',
    'attention[init_scale=0]',
    'attention_side[init_scale=0]',
    'compacter[init_weights="zero"]',
    'invertible[init_weights="zero"]',
    'lora',
    'vera',
    'adalora',
    'mtl_lora',
    'ia3',
)
RNG = np.random.default_rng(0)


def parity(backbone: LoadedBackbone) -> float:
    """Return the largest difference of any hidden state, padding in odd places included."""
    ids = RNG.integers(1000, 20000, (6, 128))
    mask = RNG.random(ids.shape) > 0.3
    mask[:, 0] = True
    model = transformers.BertModel.from_pretrained(backbone.directory).eval()
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids), attention_mask=torch.tensor(mask).long(), output_hidden_states=True
        ).hidden_states
    run = jax.jit(
        lambda params, ids, mask: Backbone(backbone.config).apply(
            {'params': params}, ids, mask=mask, all_hidden=True
        )
    )
    ours = run(backbone.params, ids.astype(np.int32), mask[:, None, None, :])
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(ours, theirs, strict=True))


def packed_batch() -> dict[str, np.ndarray]:
    """Return eight rows of eight texts of eight tokens."""
    rows, texts, tokens = 8, 8, 8
    row = np.arange(texts * tokens, dtype=np.int32)
    columns = {
        'token_type_ids': np.zeros_like(row),
        'positions': row % tokens,
        'segments': row // tokens + 1,
        'starts': np.arange(texts, dtype=np.int32) * tokens,
    }
    batch = {name: np.tile(column, (rows, 1)) for name, column in columns.items()}
    return batch | {'input_ids': RNG.integers(1000, 20000, (rows, len(row))).astype(np.int32)}


def changes_at_zero(backbone: LoadedBackbone) -> dict[str, float]:
    """Return by how much each adapter changes the plain backbone's logits."""
    batch, key = packed_batch(), jax.random.key(0)
    plain = Model(backbone.config, registry.create('head'), HeadConfig(), 6)
    params = plain.init(key, backbone.params)
    expected = np.asarray(jax.jit(plain.apply)(params, batch))
    changes = {}
    for name in AT_ZERO:
        model = Model(backbone.config, registry.create(name), HeadConfig(), 6)
        adapted = model.init(key, backbone.params) | {'heads': params['heads']}
        found = np.asarray(jax.jit(model.apply)(adapted, batch))
        changes[name] = float(np.abs(found - expected).max())
    return changes


def rounding(backbone: LoadedBackbone) -> dict[str, float]:
    """Return by how much the last hidden states change, relative to their size, in fewer bits.

    'kept' is by how much those over int8 differ from those over the same numbers in float32.
    """
    placement = Placement(make_mesh(1), LAYOUTS)
    batch = packed_batch()
    mask = attention_mask(batch['segments'], 8)
    run = jax.jit(
        lambda params: Backbone(backbone.config).apply(
            {'params': params}, batch['input_ids'], positions=batch['positions'], mask=mask
        )
    )

    def hidden(dtype: Any) -> Any:
        return run(placement.frozen({'backbone': backbone.params}, dtype)['backbone'])

    eight = placement.frozen({'backbone': backbone.params}, np.int8)['backbone']
    kept = run(map_with_path(lambda _, leaf: quantize.dequantize(leaf), eight))
    exact = hidden(np.float32)
    size = jnp.linalg.norm(exact)
    found = {name: hidden(name) - exact for name in ('bfloat16', 'int8')}
    found['kept'] = hidden('int8') - kept
    return {name: float(jnp.linalg.norm(x) / size) for name, x in found.items()}


def temporaries(config: BackboneConfig) -> dict[str, int]:
    """Return the bytes of a step's temporaries by policy of rematerialisation."""
    settings = {remat: memory.Setting('houlsby', remat=remat) for remat in REMAT}
    return {name: memory.measure(config, s, 32, 128)['temporary'] for name, s in settings.items()}


if __name__ == '__main__':
    minilm = load_backbone('minilm')
    numbers = {'parity': parity(minilm), 'changes': changes_at_zero(minilm)}
    numbers |= {'rounding': rounding(minilm), 'temporaries': temporaries(minilm.config)}
    print(json.dumps(numbers))
