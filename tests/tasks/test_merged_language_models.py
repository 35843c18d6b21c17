"""Merged masked language models are whole models of transformers, head and all."""

import numpy as np
import pytest
import torch
import toy
import transformers
from toy_language_models import MODELS, write_language_model

from adapters_jax.convert import convert
from adapters_jax.predict import predict
from adapters_jax.train import train
from experiments.toy import vocabulary


@pytest.mark.parametrize('train_head', ['auto', 'all'])
@pytest.mark.parametrize('family', MODELS)
def test_merged_is_a_language_model_of_transformers(tmp_path, family, train_head):
    write_language_model(tmp_path / 'm', family)
    toy.write_texts(tmp_path / 'texts.csv', 20)
    given = toy.config(str(tmp_path / 'm'), str(tmp_path / 'texts.csv'), training__steps=2)
    given.task.name, given.method, given.head.train = 'masked_lm', 'lora[r=2]', train_head
    given.optimizer.learning_rate, given.data.max_length = 0.1, 60
    train(given, tmp_path / 'w')
    convert(tmp_path / 'w' / 'adapter', tmp_path / 'merged', 'merged')
    make, tokenizer = transformers.AutoModelForMaskedLM, transformers.AutoTokenizer
    model, report = make.from_pretrained(tmp_path / 'merged', output_loading_info=True)
    assert type(model) is MODELS[family][1] and not any(report.values())
    text = ' '.join(('[MASK]', *vocabulary()[20:24], '[MASK]'))
    words = tokenizer.from_pretrained(tmp_path / 'merged')
    batch = words(text, return_tensors='pt', return_token_type_ids=False)
    with torch.no_grad():
        scores = model.eval()(**batch).logits.softmax(-1)
    expected = scores[batch['input_ids'] == words.mask_token_id].topk(5).values.numpy()
    (row,) = predict(tmp_path / 'w' / 'adapter', [{'text': text}])
    found = [[word['probability'] for word in own] for own in row['masks']]
    np.testing.assert_allclose(found, expected, atol=2e-5)
