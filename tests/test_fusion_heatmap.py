"""The heat map of a fusion shows its mean weights over the tokens of the given texts."""

import numpy as np
import pytest
import toy

from adapters_jax.train import train
from experiments import fusion_heatmap

pytestmark = pytest.mark.usefixtures('compiled_once')
ROWS = [{'text': 'a few words'}, {'text': 'words'}]


def test_the_map_of_a_trained_fusion(tmp_path):
    backbone = toy.write_backbone(tmp_path / 'bert', layers=2)
    texts = toy.write_texts(tmp_path / 'texts.csv', 60)
    config = toy.config(backbone, texts, training__steps=2)
    config.method = 'fuse(a, b)'
    config.adapters = 'a=pfeiffer[size=3],b=pfeiffer[size=3]'
    train(config, tmp_path / 'run')
    names, weights = fusion_heatmap.mean_weights(tmp_path / 'run' / 'adapter', ROWS)
    assert names == ['a', 'b']
    assert weights.keys() == {'layer_0/feed_forward', 'layer_1/feed_forward'}
    for mean in weights.values():
        np.testing.assert_allclose(mean.sum(), 1, atol=1e-5)
    drawn = fusion_heatmap.render(names, weights)
    assert drawn.count('text-anchor="middle"') == 4
    assert f'>{weights["layer_0/feed_forward"][0]:.2f}</text>' in drawn

    config.method = 'pfeiffer[size=3]'
    config.adapters = ''
    train(config, tmp_path / 'plain')
    with pytest.raises(ValueError, match='the adapter has 0 fusions'):
        fusion_heatmap.mean_weights(tmp_path / 'plain' / 'adapter', ROWS)
