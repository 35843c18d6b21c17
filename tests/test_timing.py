"""Times are of the same rounds, in balanced order, and a benchmark's table is made of them."""

import itertools
import json

import numpy as np
import pytest
import toy

from experiments.bench import adapter_drop, timing
from experiments.bench.timing import Times, compare, order, quartiles


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a function moves it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
    return now


def test_functions_take_turns_and_each_round_has_a_ratio_of_its_own(clock):
    called = []

    def work(name, seconds):
        def call():
            called.append(name)
            # From the third round on, the machine is ten times as slow.
            clock[0] += seconds * (10 if len(called) > 8 else 1)

        return call

    found = compare({'slow': work('slow', 0.4), 'quick': work('quick', 0.1)}, repeats=4, warmup=2)
    assert called[:4] == ['slow', 'slow', 'quick', 'quick']
    assert called[4:] == ['slow', 'quick', 'quick', 'slow', 'quick', 'slow', 'slow', 'quick']
    assert found['slow'].seconds == pytest.approx([0.4, 0.4, 4, 4])
    ratio = found['slow'].over(found['quick'])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4, 4, 4))


def test_quick_functions_are_called_until_there_is_something_to_measure(clock):
    calls = [0]

    def quick():
        calls[0] += 1
        clock[0] += timing.LEAST / 3.5

    found = compare({'quick': quick}, repeats=2, warmup=1)
    assert calls[0] == 1 + 2 * 4
    assert found['quick'].seconds == pytest.approx([timing.LEAST / 3.5] * 2)


def test_each_is_as_often_before_any_other_as_after_it():
    names = list('abcd')
    rounds = [order(names, i) for i in range(8)]
    assert all(sorted(names_of_round) == names for names_of_round in rounds)
    for a, b in itertools.combinations(names, 2):
        assert sum(r.index(a) < r.index(b) for r in rounds) == 4
    for place in range(4):
        assert sorted(r[place] for r in rounds) == sorted(names * 2)


def test_median_and_quartiles():
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert times.median == 3 and times.quartiles == (2, 4)
    assert quartiles([7.0]) == (7, 7)
    assert str(times.over(Times((1.0,) * 5))) == '3.00 (2.00 to 4.00)'


@pytest.mark.parametrize(('functions', 'repeats', 'warmup'), [({}, 1, 1), ({'a': int}, 0, 1),
                                                              ({'a': int}, 1, 0)])  # fmt: skip
def test_nothing_to_compare_is_refused(functions, repeats, warmup):
    with pytest.raises(ValueError, match='expected one or more of each'):
        compare(functions, repeats, warmup)


def test_times_of_other_rounds_are_not_compared():
    with pytest.raises(ValueError, match='2 and 3 rounds cannot be compared'):
        Times((1.0, 2.0)).over(Times((1.0, 2.0, 3.0)))


@pytest.mark.slow
def test_the_adapter_drop_benchmark_writes_its_table(tmp_path, capsys):
    backbone = toy.write_backbone(tmp_path / 'backbone', layers=2)
    method = 'pfeiffer[reduction_factor=4]'
    adapter_drop.main(str(tmp_path / 'out'), backbone, [method], rows=2, length=8, repeats=1)
    result = json.loads((tmp_path / 'out' / 'adapter_drop.json').read_text())
    for mode in ('inference', 'training'):
        lines = result['methods'][method][mode]
        assert [line['dropped'] for line in lines] == [0, 1, 2]
        assert (np.diff([line['flops'] for line in lines]) < 0).all()
        assert lines[0]['ratio'] == {'value': 1, 'low': 1, 'high': 1}
    table = (tmp_path / 'out' / 'adapter_drop.md').read_text()
    assert table == adapter_drop.render(result) + '\n'
    rows = [line for line in table.splitlines() if line.startswith(f'| `{method}`')]
    assert [row.split('|')[2].strip() for row in rows] == ['0', '1', '2']
    assert rows[0].count('1.00 (1.00 to 1.00) | 0 % | 1.000') == 2
    assert table in capsys.readouterr().out
