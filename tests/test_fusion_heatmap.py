"""The heat map of fusions shows their mean weights over the tokens of the given texts."""

import dataclasses
import json

import numpy as np
import pytest
import toy
import untrained
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from adapters_jax.data.preprocess import chain
from adapters_jax.interop import adapter_folder, formats
from adapters_jax.tasks.image_classification import ImageClassification
from adapters_jax.tasks.sequence_to_sequence import SequenceToSequence
from adapters_jax.training import experiment
from experiments import fusion_heatmap

pytestmark = pytest.mark.usefixtures('compiled_once')
ROWS = [{'text': 'a few words'}, {'text': 'words'}]
PLACES = {'layer_0/feed_forward', 'layer_1/feed_forward'}


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    return toy.write_backbone(tmp_path_factory.mktemp('fused') / 'bert', layers=2)


@pytest.fixture(scope='module')
def found(backbone, tmp_path_factory):
    """An adapter with two fusions, one of which acts twice, and the mean weights of all."""
    adapter = tmp_path_factory.mktemp('fused') / 'adapter'
    untrained.write(adapter, backbone, 'stack(fuse(a, b), fuse(b, c, a), fuse(a, b))')
    return fusion_heatmap.mean_weights(adapter, ROWS)


def test_each_fusion_has_mean_weights_of_its_own(found):
    names, weights = found
    assert names == {'a,b': ('a', 'b'), 'b,c,a': ('b', 'c', 'a'), 'a,b#2': ('a', 'b')}
    assert weights.keys() == names.keys()
    for fusion, places in weights.items():
        assert places.keys() == PLACES
        for mean in places.values():
            assert mean.shape == (len(names[fusion]),)
            np.testing.assert_allclose(mean.sum(), 1, atol=1e-5)
    # The same parameters on another input.
    first, again = (weights[name]['layer_1/feed_forward'] for name in ('a,b', 'a,b#2'))
    assert np.abs(first - again).max() > 1e-3


def test_what_is_drawn(found, tmp_path):
    names, weights = found
    figure = fusion_heatmap.draw(names, weights)
    figure.savefig(tmp_path / 'map.png', format='png')
    assert figure.get_suptitle() == 'Mean attention weight of the fused adapters'
    *maps, bar = figure.axes
    assert [axes.get_title() for axes in maps] == list(weights)
    assert bar.get_ylabel() == 'mean weight over all tokens'
    for axes, (fusion, places) in zip(maps, weights.items(), strict=True):
        assert [x.get_text() for x in axes.get_xticklabels()] == list(names[fusion])
        rows = [y.get_text() for y in axes.get_yticklabels()]
        assert rows == ['layer 0, feed forward', 'layer 1, feed forward']
        cells = [text.get_text() for text in axes.texts]
        assert cells == [f'{x:.2f}' for place in sorted(places) for x in places[place]]
    check_nothing_is_cut(figure)


def check_nothing_is_cut(figure):
    """Every text lies inside of the picture."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    width, height = figure.bbox.size
    texts = [text for axes in figure.axes for text in (*axes.get_xticklabels(), axes.title)]
    texts += [text for axes in figure.axes for text in axes.get_yticklabels()]
    for text in texts:
        box = text.get_window_extent(renderer)
        if text.get_text():
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text


def test_long_names_are_shortened_and_stay_inside():
    names = {'f': ('x' * 80, 'y')}
    weights = {'f': {f'layer_{i}/attention': np.array([0.9, 0.1]) for i in (10, 9, 0)}}
    figure = fusion_heatmap.draw(names, weights)
    figure.draw_without_rendering()
    (axes, _) = figure.axes
    assert axes.get_xticklabels()[0].get_text() == 'x' * 29 + '…'
    rows = [y.get_text() for y in axes.get_yticklabels()]
    assert rows == ['layer 0, attention', 'layer 9, attention', 'layer 10, attention']
    check_nothing_is_cut(figure)


def test_texts_are_prepared_as_for_predictions(backbone, tmp_path):
    folder = untrained.folder(backbone, 'fuse(a, b)')
    adapter_folder.save(folder, tmp_path / 'plain')
    steps = chain.create(['stop_words[language=en]'], lambda _: None).to_json()
    adapter_folder.save(dataclasses.replace(folder, preprocess=steps), tmp_path / 'stepped')
    texts = [{'text': 'the river of the day'}]
    found, wanted, other = (
        fusion_heatmap.mean_weights(tmp_path / name, rows)[1]['a,b']['layer_1/feed_forward']
        for name, rows in (
            ('stepped', texts),
            ('plain', [{'text': 'river day'}]),
            ('plain', texts),
        )
    )
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found - other).max() > 1e-4


@pytest.mark.parametrize('kind', ['png', 'svg'])
def test_the_command(backbone, tmp_path, capsys, kind):
    adapter = untrained.write(tmp_path / 'adapter', backbone, 'fuse(a, b)')
    lines = tmp_path / 'in.jsonl'
    lines.write_text('\n\n'.join(map(json.dumps, ROWS)))
    fusion_heatmap.main(str(adapter), str(lines), str(tmp_path / f'map.{kind}'), '')
    said = capsys.readouterr().out.split('\n')
    assert said[0].startswith('a,b: ') and said[1] == f'wrote {tmp_path}/map.{kind}: 2 places'
    if kind == 'png':
        pixels = np.asarray(Image.open(tmp_path / 'map.png').convert('L'))
        assert min(pixels.shape) > 300 and pixels.std() > 10
    else:
        assert '<svg' in (tmp_path / 'map.svg').read_text()
    with pytest.raises(ValueError, match=r"ends with '\.gif'; expected \.png or \.svg"):
        fusion_heatmap.main(str(adapter), str(lines), str(tmp_path / 'map.gif'), '')
    lines.write_text(lines.read_text() + '\n\n{"txt": "no text"}\n')
    with pytest.raises(ValueError, match='line 5'):
        fusion_heatmap.main(str(adapter), str(lines), str(tmp_path / 'map.png'), '')
    lines.write_text('\n')
    with pytest.raises(ValueError, match='the input holds no examples'):
        fusion_heatmap.main(str(adapter), str(lines), str(tmp_path / 'map.png'), '')


@pytest.mark.parametrize(
    ('task', 'told'), [(ImageClassification, 'reads pixels'), (SequenceToSequence, 'writes texts')]
)
def test_what_reads_no_texts_or_writes_them_has_no_map(task, told):
    with pytest.raises(ValueError, match=f'the adapter {told}; a heat map is over the tokens'):
        fusion_heatmap._check_reads_texts(task)


def test_adapters_without_a_map(backbone):
    loaded = formats.load_backbone(backbone)
    model = experiment.bind(untrained.folder(backbone, 'stack(a)'), loaded)
    with pytest.raises(ValueError, match='the adapter has no fusion'):
        fusion_heatmap.fused(model)
    dividing = untrained.folder(backbone, 'parallel(stack(fuse(a, b)), b)')
    with pytest.raises(ValueError, match='split, batch_split and parallel divide or copy a batch'):
        experiment.bind(dividing, loaded)
