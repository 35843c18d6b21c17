"""Folders that the `adapters` library writes and reads: its models, small and random, and texts."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import adapters
import jax
import numpy as np
import reference
import torch
import transformers
from safetensors.torch import save_file

from adapters_jax import tasks
from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import bind
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import HeadConfig

CLASSES = {
    'bert': (transformers.BertConfig, adapters.BertAdapterModel),
    'roberta': (transformers.RobertaConfig, adapters.RobertaAdapterModel),
    'xlm-roberta': (transformers.XLMRobertaConfig, adapters.XLMRobertaAdapterModel),
}
SIZES = {
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 48,
    'vocab_size': 61,
    'max_position_embeddings': 40,
    'attn_implementation': 'eager',  # with 'sdpa' the prompts of the library look at padding
}
_AGAIN = 'base_model_embeddings'  # the word embeddings under a second name
LABELS = {0: 'no', 1: 'größer', 2: 'yes'}
SMALL_BN = {'reduction_factor': 4}
# Each preset of the library, made small, and options beside them.
CONFIGS = {
    'seq_bn': adapters.SeqBnConfig(**SMALL_BN),
    'double_seq_bn': adapters.DoubleSeqBnConfig(**SMALL_BN),
    'par_bn': adapters.ParBnConfig(),
    'scaled_par_bn': adapters.ParBnConfig(scaling='learned'),
    'seq_bn_inv': adapters.SeqBnInvConfig(**SMALL_BN),
    'double_seq_bn_inv': adapters.DoubleSeqBnInvConfig(**SMALL_BN),
    'adapter_plus': adapters.AdapterPlusConfig(reduction_factor=6, stochastic_depth=0.0),
    'norms': adapters.SeqBnConfig(**SMALL_BN, ln_before=True, ln_after=True, leave_out=[0]),
    'by_layer': adapters.DoubleSeqBnConfig(reduction_factor={'1': 2, 'default': 5}),
    'compacter': adapters.CompacterConfig(reduction_factor=4),
    'compacter++': adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_rank=2),
    'shared_blocks': adapters.CompacterConfig(
        reduction_factor=4, shared_W_phm=True, factorized_phm_rule=True, ln_before=True
    ),
    'own_rules': adapters.CompacterConfig(
        reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False, learn_phm=False
    ),
    'own_factors': adapters.CompacterConfig(
        reduction_factor=4, shared_phm_rule=False, factorized_phm_rule=True, phm_bias=False
    ),
    'prefix_tuning': adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    'prefix_tuning_flat': adapters.PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[0]),
    'prompt_tuning': adapters.PromptTuningConfig(prompt_length=3),
    'prompt_after_bos': adapters.PromptTuningConfig(prompt_length=3, combine='prefix_after_bos'),
    'lora': adapters.LoRAConfig(r=4, alpha=6),
    'lora_everywhere': adapters.LoRAConfig(
        r=3, alpha=2, attn_matrices=['q', 'k', 'v'], intermediate_lora=True, output_lora=True
    ),
    'ia3': adapters.IA3Config(),
    'ia3_scaled': adapters.IA3Config(alpha=2, output_lora=True),
    'vera': adapters.VeraConfig(r=4),
    'vera_scaled': adapters.VeraConfig(r=4, alpha=6),
    'dora': adapters.DoRAConfig(r=4, alpha=6),
    'dvora': adapters.DvoRAConfig(r=4, alpha=4),
    'dvora_scaled': adapters.DvoRAConfig(r=4, alpha=6),
    'mtl_lora': adapters.MTLLoRAConfig(r=4, alpha=6, n_up_projection=2),
    'loreft': adapters.LoReftConfig(r=2, suffix_positions=1, dropout=0.0),
    'noreft': adapters.NoReftConfig(r=2, layers=[1], non_linearity='relu'),
    'square_reft': adapters.LoReftConfig(r=SIZES['hidden_size'], dropout=0.0),
    'tied_reft': adapters.NoReftConfig(r=2, suffix_positions=1, tied_weights=True),
    'mam': adapters.MAMConfig(adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5)),
    'unipelt': adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5)
    ),
    'gated_bn': adapters.SeqBnConfig(**SMALL_BN, use_gating=True, scaling=0.5),
    'gated_lora': adapters.LoRAConfig(r=4, alpha=6, use_gating=True),
    'gated_ia3': adapters.IA3Config(alpha=2, use_gating=True),
    'gated_vera': adapters.VeraConfig(r=4, alpha=6, use_gating=True),
    'gated_dora': adapters.DoRAConfig(r=4, alpha=6, use_gating=True),
    'gated_mtl': adapters.MTLLoRAConfig(r=4, alpha=6, use_gating=True),
    'gated_prefix': adapters.PrefixTuningConfig(
        flat=True, prefix_length=3, use_gating=True, shared_gating=False
    ),
}

# The presets that stand for a config: all that our method has in common with it, but for sizes.
PRESETS = {
    'seq_bn': ['pfeiffer'],
    'seq_bn_inv': ['seq_bn_inv', 'invertible'],
    'mam': ['mam', 'mam_adapters'],
}

# The library's gates look at padding, so these are compared on texts without any.
GATED = [name for name in CONFIGS if name.startswith('gated') or name == 'unipelt']


@dataclasses.dataclass(frozen=True)
class Source:
    """A backbone as the library's class and config, its weights, and the folder it lies in."""

    family: str
    config: transformers.PretrainedConfig
    tensors: dict
    directory: Path

    @functools.cached_property
    def loaded(self):
        return load_backbone(str(self.directory))

    def model(self):
        """Return a fresh model of the library with these weights and no adapter."""
        # Models that share a config share their heads.
        model = CLASSES[self.family][1](copy.deepcopy(self.config))
        found = model.load_state_dict(self.tensors, strict=False)
        assert not found.unexpected_keys
        assert all(_AGAIN in name for name in found.missing_keys)
        return model.eval()


def write_source(directory, family='bert', **sizes):
    """Write a small random backbone as a Hugging Face folder."""
    config = CLASSES[family][0](**SIZES | sizes)
    model = CLASSES[family][1](copy.deepcopy(config))
    reference.randomise(model, 0)
    tensors = {name: x.clone() for name, x in model.state_dict().items() if _AGAIN not in name}
    directory.mkdir()
    save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
    (directory / 'config.json').write_text(config.to_json_string())
    return Source(family, config, tensors, directory)


def adapted(source, config, name='ad', head=None, seed=1):
    """Return a model of the library with an adapter and a head, their weights random."""
    model = source.model()
    model.add_adapter(name, config=config)
    options = {'num_labels': 3, 'id2label': LABELS} | (head or {})
    model.add_prediction_head(adapters.ClassificationHead(model, name, **options))
    randomise(source, model, seed)
    model.set_active_adapters(name)
    return model.eval()


def randomise(source, model, seed):
    """Randomise what is not the backbone's; the signs within an orthogonal projection stay."""
    signs = {
        name: x.detach().diagonal().clone()
        for name, x in model.named_parameters()
        if name.endswith('parametrizations.weight.original')
    }
    reference.randomise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in source.tensors:
                parameter.copy_(source.tensors[name])
            elif name in signs:
                parameter.diagonal().copy_(signs[name])
            elif parameter.ndim > 1:  # wide matrices must not amplify rounding errors
                parameter.mul_((SIZES['hidden_size'] / source.config.hidden_size) ** 0.5)


def loaded_by_library(source, directory, name=None, safetensors=True):
    """Return a fresh model of the library with the folder's adapter; nothing may be left over."""
    model, found = source.model(), {}
    name = model.load_adapter(
        str(directory), load_as=name, use_safetensors=safetensors, loading_info=found
    )
    assert not any(found.values()), found
    model.set_active_adapters(name)
    return model.eval()


def texts(source, padded=True):
    """Return random `input_ids` and `mask` [3, 9]."""
    model = type('Model', (), {'config': source.config})
    return reference.texts(model, seed=3, padded=padded)


def library_logits(model, source, padded=True):
    """Return the library's logits [3, C] of the texts."""
    ids, mask = texts(source, padded)
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask).long())[0].numpy()


def our_logits(folder, source, padded=True):
    """Return our logits [3, C] of the texts."""
    return our_outputs(folder, source, padded)[:, 0]


def our_outputs(folder, source, padded=True):
    """Return our outputs of the texts, [3, 1, C], or of their tokens, [3, 9, C]."""
    ids, mask = texts(source, padded)
    model = Model(
        config=source.loaded.config,
        method=registry.from_json(folder.method),
        head_config=HeadConfig(**folder.head),
        outputs=tasks.from_json(folder.task).num_outputs,
        name=folder.name,
    )
    constants = model.method.constants(source.loaded.config.dimensions)
    params = folder.overlay(source.loaded.params, constants)
    batch = {
        'input_ids': ids,
        'token_type_ids': np.zeros_like(ids),
        'positions': np.where(mask, np.arange(ids.shape[1]).reshape(1, -1), 0),
        'segments': mask.astype(np.int32),
        'starts': np.zeros((len(ids), 1), np.int32),
    }
    # Not compiled as a whole: most operations recur from test to test.
    return np.asarray(model.apply(params, batch))


def states(source, model, padded=True, **options):
    """Return the library's last hidden states, and whatever else it returns."""
    ids, mask = texts(source, padded)
    with torch.no_grad():
        return model.bert(torch.tensor(ids), attention_mask=torch.tensor(mask).long(), **options)


def ours(source, method, tree, padded=True):
    """Return our last hidden states, and the weights of all fusions."""
    ids, mask = texts(source, padded)
    loaded, record = source.loaded, {}

    def run(tree):
        sites = bind(method, tree, None, record=record)
        hidden = Backbone(loaded.config).apply(
            {'params': loaded.params}, ids, mask=mask[:, None, None, :], sites=sites
        )
        return hidden, record

    return jax.jit(run)(tree)


def edit(path, **changes):
    """Change entries of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def pretrained_source(name):
    """Return a pretrained BERT by a name of ours."""
    loaded = load_backbone(name)
    plain = transformers.BertModel.from_pretrained(loaded.directory, attn_implementation='eager')
    tensors = {f'bert.{key}': x.clone() for key, x in plain.state_dict().items()}
    return Source('bert', plain.config, tensors, loaded.directory)
