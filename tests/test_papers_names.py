"""The names under which the protocols find their finished runs again."""

import hashlib
import json
from pathlib import Path

from all_papers import paper

from adapters_jax import config as configs
from experiments.papers.runner import Runner


def test_runs_of_before_a_key_was_there_are_found_again():
    own = Runner(paper('mahabadi2021'), 'small', '', Path('runs'), ['trec'])
    cell = own.cells[0]
    settings = configs.decisive(own.paper.config(cell, 'small', 'paper', ()))
    del settings['task.token_types']
    told = json.dumps([settings, [], cell.source_settings], sort_keys=True).encode()
    assert own.name_of(cell).endswith(f'-{hashlib.sha256(told).hexdigest()[:10]}')
    other = Runner(own.paper, 'small', '', Path('runs'), ['trec'], ['task.token_types=False'])
    assert own.name_of(cell) != other.name_of(cell)
