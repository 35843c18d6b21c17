"""The benchmark of many devices: what it estimates by hand, and that its tables are its numbers."""

import pytest

from adapters_jax import config as configs
from experiments.bench import scaling

POD = scaling.Pod('pod', flops=1e12, inside=1e9, group=8, between=1e8, source='here')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A config, and a folder with a size that this machine compiles in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2}
        patch.setitem(scaling.SIZES, 'tiny', sizes)
        patch.setattr(scaling, 'LENGTH', 8)
        patch.setattr(scaling, 'ROWS', 1)
        config = configs.base()
        config.task.labels = ('no', 'yes')
        yield config, tmp_path_factory.mktemp('sizes')


def test_sums_go_round_each_group_and_then_between_groups():
    assert POD.seconds_to_send(1e9, 8) == 1
    assert POD.seconds_to_send(1e9, 64) == 1 + 1e9 / 8 / 1e8
    found = {'sent': 2 * 7 / 8 * 1e9, 'flops': 4e11}
    one, many = (scaling.estimate(found, POD, chips) for chips in (8, 64))
    assert one['compute'] == many['compute'] == pytest.approx(0.4 / scaling.UTILISATION)
    assert one['send'] == pytest.approx(1.75)
    assert many['send'] == pytest.approx(2 * 63 / 64 * (1 + 1.25))


@pytest.mark.slow
def test_adapters_send_their_own_gradients_only(small):
    config, folder = small
    rows = scaling.programs(config, ['tiny'], folder)
    assert [row['method'] for row in rows] == list(scaling.METHODS)
    for row in rows:
        trained = row['data']['held']['trainable']
        # The gradients, and with them a few numbers such as the loss.
        more = row['data']['sent'] / (2 * 7 / 8) - trained
        # Full fine-tuning has a pooler that the head does not use: its gradient is zero everywhere.
        assert (-0.01 * trained if row['method'] == 'full' else 0) <= more < 100, row['method']
        assert row['fsdp']['held']['frozen'] <= row['data']['held']['frozen']
    full, lora = (next(r for r in rows if r['method'] == name) for name in ('full', 'lora'))
    assert lora['data']['sent'] < full['data']['sent'] / 10
    assert len(full['estimates']) == len(scaling.PODS) * len(scaling.CHIPS)
    table = '\n'.join(scaling._sent(rows))
    assert f'| tiny | `lora` | {lora["data"]["held"]["trainable"] / 4:,.0f} |' in table


@pytest.mark.slow
def test_times_are_multiples_of_one_device(small, tmp_path):
    config, folder = small
    config = scaling.sized(config, 'tiny', 'lora', folder)
    config = scaling.on_mesh(config, (1, 1, 1), 4)
    meshes = {'one': (1, 1, 1), 'data 2': (2, 1, 1)}
    steps = scaling.measure(config, 1, meshes)
    assert steps['one']['ratio'] == {'value': 1, 'low': 1, 'high': 1}
    assert steps['data 2']['devices'] == 2 and steps['data 2']['ratio']['value'] > 0
    timed = {'size': 'tiny', 'method': 'lora'}
    result = {'steps': steps, 'rows': 4, 'repeats': 1, 'timed': timed}
    result |= {'hardware': 'a machine', 'commit': 'abcdef123'}
    table = scaling.render(result | {'programs': []})
    assert '| one | 1 | 1.00 (1.00 to 1.00) |' in table and '| data 2 | 2 | ' in table
