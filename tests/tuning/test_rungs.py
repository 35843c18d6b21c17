"""Who counts at a rung, after a kill too; and what the populations of a choice have in common."""

import pytest
import toy

from adapters_jax.params import flatten
from adapters_jax.training import grid
from adapters_jax.training.progress import Progress, share_of_steps
from adapters_jax.tuning import populations, rungs


@pytest.mark.parametrize(
    ('finished', 'steps', 'expected'),
    [
        ('', 0, True),
        ('pruned after 25 % of the steps: not among the best 1/2', 10, True),
        ('all steps taken', 20, True),
        ('no improvement in 2 evaluations', 10, False),
        # The steps are those before the one that failed.
        ('diverged: the loss of step 11 is nan', 10, True),
        ('diverged: the loss of step 10 is nan', 9, False),
        ('diverged: after step 10 the outputs for a split are not finite', 9, False),
    ],
)
def test_who_still_trained_after_the_evaluation_of_step_10(finished, steps, expected):
    assert rungs._reached(Progress(finished=finished, steps=steps), 10) is expected


def test_populations_over_one_backbone_hold_it_once(tmp_path):
    backbone = toy.write_backbone(tmp_path / 'bert')
    given = toy.config(backbone, toy.write_texts(tmp_path / 'texts.csv', 40))
    given.sweep.grid = ('method=head,bitfit', 'training.frozen_dtype=float32,bfloat16')
    groups = grid.populations(grid.expand(given), 0)
    build = populations.Builder()
    experiments = [build(group[0].config) for group in groups]
    with rungs.opened(groups, experiments, tmp_path / 'w', 0) as runs:
        whole, halved, biased, _ = (flatten(run.frozen['backbone']) for run in runs)
        trained = flatten(runs[2].state.trainable)
    common = whole.keys() & biased.keys()
    assert common and all(whole[path] is biased[path] for path in common)
    assert {f'backbone/{path}' for path in whole.keys() - common} <= trained.keys()
    assert not any(whole[path] is halved[path] for path in common)


def test_so_do_those_of_which_one_has_its_members_spread_and_the_other_its_rows(tmp_path):
    backbone = toy.write_backbone(tmp_path / 'bert')
    given = toy.config(backbone, toy.write_texts(tmp_path / 'texts.csv', 40))
    given.mesh.data = 2
    given.sweep.grid = ('method=lora[r=2],bitfit', 'seed=0,1')
    first, second = grid.populations(grid.expand(given), 0)
    second = second[:1]  # which does not divide over two devices
    build = populations.Builder()
    experiments = [build(group[0].config) for group in (first, second)]
    with rungs.opened([first, second], experiments, tmp_path / 'w', 0) as runs:
        spread, whole = (flatten(run.frozen['backbone']) for run in runs)
        meshes = [run.mesh.axis_names for run in runs]
    assert ['members' in names for names in meshes] == [True, False]
    for path in spread.keys() & whole.keys():
        assert spread[path].sharding != whole[path].sharding
        assert pointers(spread[path]) == pointers(whole[path])


def pointers(leaf):
    """Return where in memory the parts of a leaf begin."""
    return [part.data.unsafe_buffer_pointer() for part in leaf.addressable_shards]


@pytest.mark.parametrize(
    ('steps', 'share', 'expected'),
    [(100, 1.1, 110), (100, 0.07, 7), (100, 0.1 * 3, 30), (100, 0.301, 31), (7, 1 / 3, 3)],
)
def test_a_share_of_the_steps_is_what_it_is_on_paper(steps, share, expected):
    assert share_of_steps(steps, share) == expected
