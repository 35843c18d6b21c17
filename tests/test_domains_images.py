"""The experiment with images, on toy images: what it writes, and what it says was forgotten."""

import json

import pytest
import toy_images

from adapters_jax.interop import adapter_folder
from adapters_jax.interop.backbones import load_backbone
from experiments.domains import images as experiment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_once')]

METHODS = ('pfeiffer[reduction_factor=8]', 'full', 'scratch')
SETS = ('first', 'classes', 'digits')


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A finished experiment on five colours of 32 x 32 pixels, and its output."""
    folder = tmp_path_factory.mktemp('domain')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ADAPTERS_JAX_CACHE', str(folder / 'cache'))
        patch.setattr(toy_images, 'SIDE', 32)
        colours = {**toy_images.COLOURS, 'black': (0, 0, 0), 'white': (255, 255, 255)}
        patch.setattr(toy_images, 'COLOURS', colours)
        patch.setattr(experiment, 'VIT', experiment.VIT | {'num_hidden_layers': 1})
        contents = {
            f'{split}/{name}': content
            for number, (split, count) in enumerate({'train': 100, 'test': 40}.items())
            for name, content in toy_images.files(count, number).items()
        }
        tar = toy_images.write_tar(folder / 'set.tar', contents)
        options = {'seeds': ['0'], 'pretrain_epochs': 3.0, 'epochs': 1.0, 'targets': ['classes']}
        experiment.main(str(folder / 'out'), tar, **options, methods=METHODS)
        # A second time everything is there.
        experiment.main(str(folder / 'out'), tar, **options, methods=METHODS)
    return folder / 'out'


def test_the_last_classes_are_kept_from_the_pretraining(done):
    names = {kind: {p.name for p in (done / 'sets' / kind / 'train').iterdir()} for kind in SETS}
    assert names['first'] == {'black', 'blue'} and names['classes'] == {'green', 'red', 'white'}
    assert names['digits'] == set('0123456789')
    digits = {s: len(list((done / 'sets/digits' / s).rglob('*.png'))) for s in ('train', 'test')}
    assert digits == {'train': 1437, 'test': 360}


def test_an_adapter_forgets_nothing_and_the_table_says_so(done):
    result = json.loads((done / 'images.json').read_text())
    (seed,) = result['seeds']
    rows = seed['targets']['classes']
    assert list(rows) == list(METHODS)
    assert rows[METHODS[0]]['first'] == seed['accuracy'] and 'first' not in rows['scratch']
    assert rows[METHODS[0]]['trainable_parameters'] < rows['full']['trainable_parameters'] / 3
    assert result['sizes']['first'] == [40, 16] and result['classes']['digits'] == 10
    assert result['commit'] and result['hardware'] and result['versions']
    table = (done / 'images.md').read_text()
    lines = [line for line in table.splitlines() if line.startswith('| `pfeiffer')]
    assert len(lines) == 1 and lines[0].endswith(' 0 |')


def test_looking_back_reads_what_tuning_has_left_of_the_weights(done):
    loaded = load_backbone(str(done / 'pretrained_0'))
    pretrained = adapter_folder.load(done / 'first_0' / 'adapter')
    first = experiment.First(pretrained, loaded, done / 'sets' / 'first')
    tuned = adapter_folder.load(done / 'classes_full_0' / 'adapter')
    adapter = adapter_folder.load(done / 'classes_pfeiffer-reduction_factor-8_0' / 'adapter')
    assert first.accuracy(adapter) == first.accuracy()
    # Weights of nothing but zeros know nothing of the first set.
    norm = {name: 0 * leaf for name, leaf in tuned.backbone_params['final_norm'].items()}
    spoilt = {**tuned.backbone_params, 'final_norm': norm}
    blank = type(tuned)(**{**vars(tuned), 'backbone_params': spoilt})
    assert first.accuracy(blank) == 0.5


def test_other_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match='--targets=words; expected classes, digits or both'):
        experiment.main(str(tmp_path), 'x.tar', 1, 1.0, 1.0, ['words'], METHODS)
