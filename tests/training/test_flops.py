"""The arithmetic that is told of a step is that of all its passes."""

import jax
import pytest
import toy

from adapters_jax.training import ahead


def counted(tmp_path, batch_size, accumulate):
    config = toy.config(toy.write_backbone(tmp_path / 'bert'), 'none.csv', method='lora[r=2]')
    config.task.labels = tuple(toy.TOPICS)
    config.training.batch_size, config.training.accumulate = batch_size, accumulate
    plan = ahead.plan(config, jax.devices()[:1], length=16)
    return ahead.measure(ahead.trace_step(plan), dict(plan.placement.mesh.shape))['flops']


def test_a_batch_in_parts_is_counted_whole(tmp_path):
    whole, parts = counted(tmp_path, 8, 1), counted(tmp_path, 8, 4)
    assert parts == pytest.approx(whole, rel=0.1)
    assert counted(tmp_path, 16, 4) == pytest.approx(2 * whole, rel=0.1)
