"""Adapters made by the library `peft`, with random weights, and what they and ours compute."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import reference
import torch
import transformers
from safetensors.numpy import load_file

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import bind
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import HeadConfig

# A LayerNorm is no layer that it knows, an empty projection looks damaged to it, and it looks for
# AdaLoRA's pattern among the keys of LoRA's.
OF_THE_LIBRARY = (
    'Unsupported layer type',
    r'Adapter .default.. \d+ LoRA tensor',
    'The following rank_pattern keys',
)
torch.set_num_threads(1)  # more of them wait for each other longer than these sizes compute
SIZES = {
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 48,
    'vocab_size': 61,
    'max_position_embeddings': 40,
}
CLASSES = {
    'bert': (
        transformers.BertConfig,
        transformers.BertForSequenceClassification,
        transformers.BertModel,
    ),
    'roberta': (
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
        transformers.RobertaModel,
    ),
}


def make_base(directory, family='bert', labels=3):
    """Write a small random backbone as a Hugging Face folder."""
    config, _, bare = CLASSES[family]
    model = bare(config(**SIZES, num_labels=labels))
    reference.randomise(model, 0)
    model.save_pretrained(directory)
    return directory


def fresh(base, family='bert', labels=3, bare=False):
    """Return a model of transformers over the backbone; its head has random non-zero weights."""
    _, head, plain = CLASSES[family]
    transformers.logging.set_verbosity_error()  # a new head is what is wanted
    if bare:
        return plain.from_pretrained(base).eval()
    model = head.from_pretrained(base, num_labels=labels)
    reference.randomise(model.classifier, 5)
    return model.eval()


def adapt(model, config, sigma=0.2, seed=1):
    """Return the model with an adapter of `peft` whose trained parameters are all random."""
    # For what it draws itself. Of seeds 0 to 3, T5 gated under 'lora patterns' has states up to 36
    # with seed 1, and float32 is 6e-5 off there (torch's own: 2e-5); with the others 2e-5.
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                factor = any(x in name for x in ('magnitude', 'ia3', 'LayerNorm', 'ln_tuning'))
                parameter.copy_(
                    parameter * (1 + sigma * noise) if factor else parameter + sigma * noise
                )
    return adapted.eval()


def texts(model, seed=0, rows=3, length=9):
    """Return `input_ids`, `mask` and `token_type_ids` [B, T] of padded rows."""
    ids, mask = reference.texts(model, seed, rows, length)
    types = np.arange(length) >= length // 2 if model.config.type_vocab_size > 1 else 0 * ids
    return ids, mask, np.broadcast_to(types, ids.shape).astype(np.int64) * mask


def torch_outputs(model, ids, mask, types):
    """Return the logits or, without a head, the last hidden states with zeros at padding."""
    inputs = {'input_ids': ids, 'attention_mask': mask.astype(np.int64)}
    inputs |= {'token_type_ids': types} if types.any() else {}
    with torch.no_grad():
        found = model(**{name: torch.tensor(x) for name, x in inputs.items()})
    if hasattr(found, 'logits'):
        return found.logits.numpy()
    return found.last_hidden_state.numpy() * mask[..., None]


def our_outputs(folder, loaded, ids, mask, types):
    """Return what the adapter computes over its backbone, as `torch_outputs` does."""
    method = registry.from_json(folder.method)
    tree = folder.overlay(loaded.params, method.constants(loaded.config.dimensions))
    tree = jax.tree.map(jnp.asarray, tree)
    positions = np.where(mask, np.arange(ids.shape[1]), 0).astype(np.int32)
    if not folder.head:
        return np.asarray(_hidden(method, loaded.config, tree, ids, types, positions, mask))
    model = Model(
        config=loaded.config,
        method=method,
        head_config=HeadConfig(**folder.head),
        outputs=len(folder.task.get('labels', [0])),
        name=folder.name,
    )
    rows = len(ids)
    batch = {
        'input_ids': ids.astype(np.int32),
        'token_type_ids': types.astype(np.int32),
        'positions': positions,
        'segments': mask.astype(np.int32),
        'starts': np.zeros((rows, 1), np.int32),
    }
    return np.asarray(jax.jit(model.apply)(tree, batch))[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(method, config, tree, ids, types, positions, mask):
    sites = bind(method, next(iter(tree['adapters'].values())), None)
    found = Backbone(config).apply(
        {'params': tree['backbone']},
        ids,
        types,
        positions,
        mask=mask[:, None, None, :],
        sites=sites,
    )
    return found * mask[..., None]


def reload(directory, model):
    """Return what `peft` makes of a folder on a fresh model.

    It warns of missing keys, which is an error here, and does not say which keys it has no use for:
    all that is in the file must be what it would save again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for message in OF_THE_LIBRARY:
            warnings.filterwarnings('ignore', message)
        config = peft.PeftConfig.from_pretrained(directory)
        head = config.task_type == 'SEQ_CLS'
        cls = (
            peft.PeftModelForSequenceClassification if head else peft.PeftModelForFeatureExtraction
        )
        adapted = cls.from_pretrained(model, directory).eval()
    saved = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    written = load_file(directory / 'adapter_model.safetensors')
    copies = {name for name in saved if 'original_module' in name or 'modules_to_save' in name}
    assert set(written) == set(saved) - copies
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, saved[name].detach().numpy(), err_msg=name)
    return adapted


def differences(folder, loaded, model, pairs=True):
    """Return the largest difference between a model of `peft` and our reading of it."""
    ids, mask, types = texts(model)
    inputs = (ids, mask, types if pairs else 0 * types)
    return np.abs(our_outputs(folder, loaded, *inputs) - torch_outputs(model, *inputs)).max()


def bits(tree):
    """Return every leaf's bytes by path."""
    return {path: np.asarray(x).tobytes() for path, x in params.flatten(tree).items()}


def edit_config(directory, **changes):
    """Change settings in a folder's config."""
    path = directory / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@functools.cache
def loaded_base(directory):
    """Return our form of a backbone's folder."""
    return load_backbone(str(directory))
