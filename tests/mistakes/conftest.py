"""What is spoilt: a small backbone, its data, a finished run and a command line over them."""

import command
import pytest
import toy
from command_lines import Line

from adapters_jax.train import train


@pytest.fixture(scope='session')
def toys(tmp_path_factory, compiled_programs):
    """A folder with a backbone, data files and a finished run, which no test changes."""
    folder = tmp_path_factory.mktemp('mistakes')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 60)
    with command.compiled_once(compiled_programs):
        train(toy.config(str(folder / 'bert'), str(folder / 'texts.csv')), folder / 'run')
    return folder


@pytest.fixture
def line(toys, tmp_path):
    """The command line of a training run over them, in a workdir of its own."""
    return Line(toys, tmp_path)
