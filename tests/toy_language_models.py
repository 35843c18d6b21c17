"""Random checkpoints with a language head and the toy tokenizer, of each family that has one."""

import torch
import toy
import transformers

from experiments.toy import vocabulary

SIZES = {
    'vocab_size': len(vocabulary()),
    'hidden_size': 32,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'intermediate_size': 64,
    'max_position_embeddings': 66,
}
MODELS = {
    'bert': (transformers.BertConfig, transformers.BertForMaskedLM),
    'roberta': (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    'distilbert': (transformers.DistilBertConfig, transformers.DistilBertForMaskedLM),
    'electra': (transformers.ElectraConfig, transformers.ElectraForMaskedLM),
}
# The others call what is theirs as BERT does.
NAMED = {
    'distilbert': {
        'dim': 32, 'n_layers': 1, 'n_heads': 2, 'hidden_dim': 64, 'vocab_size': SIZES['vocab_size'],
        'max_position_embeddings': 66,
    },
    'electra': SIZES | {'embedding_size': 16, 'hidden_act': 'relu'},
}  # fmt: skip


def write_language_model(folder, family='bert', seed=0):
    """Write a random checkpoint with a language head and the toy tokenizer; return the model."""
    make_config, make_model = MODELS[family]
    torch.manual_seed(seed)
    model = make_model(make_config(**NAMED.get(family, SIZES))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    toy.write_backbone(folder)
    model.save_pretrained(folder)
    return model
