"""Small inputs that several of these tests need."""

import json
import pathlib

import pytest
import tokenizers

WORDS = ['a', 'air', 'an', 'capital', 'flute', 'france', 'is', 'man', 'of', 'off', 'plane', 'what']


@pytest.fixture(scope='session')
def tokenizer_dir(tmp_path_factory) -> pathlib.Path:
    """A BERT tokenizer of a few words whose file switches padding and truncation on."""
    folder = tmp_path_factory.mktemp('tokenizer')
    vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(vocabulary)})
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(12)
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'config.json').write_text(json.dumps({'model_type': 'bert'}))
    settings = {'tokenizer_class': 'BertTokenizer', 'model_max_length': 8}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder
