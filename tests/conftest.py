"""Settings that every test runs under; they must precede the first use of a JAX backend."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# The tests spend their time in the compiler: without its optimisations they take a seventh of it.
# Without fused multiply-add a sum is rounded alike in every program that it is part of.
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
    # Later ones know no such flag, and end the process.
    + (' --xla_cpu_use_fusion_emitters=false' if metadata.version('jaxlib') < '0.11' else '')
    + (' --xla_cpu_max_isa=AVX' if platform.machine() == 'x86_64' else ''),
)

import command
import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_addoption(parser):
    """Add `--conformance=FILE`: which method has which property, as the tests found it.

    `--families=FILE` writes the same for each method over each family of backbones.
    """
    parser.addoption('--conformance', help='write the table of methods and properties to FILE')
    parser.addoption('--families', help='write the table of methods and families to FILE')


@pytest.fixture(scope='session')
def compiled_programs(tmp_path_factory) -> Path:
    """The folder of the programs that tests of commands have compiled."""
    return tmp_path_factory.getbasetemp() / 'compiled'


@pytest.fixture(scope='module')
def compiled_once(compiled_programs):
    """Share compiled programs between the runs and commands of the files that ask for it."""
    with command.compiled_once(compiled_programs):
        yield


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
    """Give the memory of a file's compiled programs back: of all files it is many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _shown(request, record_property):
    """Note the property (what the marker `shows` names) and the method (its `parameter`)."""
    marker = request.node.get_closest_marker('shows')
    if marker is not None:
        value = request.node.callspec.params[marker.kwargs.get('parameter', 'preset')]
        for preset in marker.kwargs.get('presets', {}).get(value, [value]):
            record_property('conformance', [preset, marker.args[0]])
    for marker in request.node.iter_markers('shows_family'):
        own, found = marker.kwargs, request.node.callspec.params
        value = found[own.get('parameter', 'preset')]
        for preset in own.get('presets', {}).get(value, [value]):
            pair = [found[own.get('family', 'family')], preset]
            record_property('families', [*pair, marker.args[0], own.get('holds', True)])


def pytest_terminal_summary(terminalreporter, config):
    """Write what the tests marked `shows` and `shows_family` found."""
    if config.getoption('--families') is not None:
        _write_families(terminalreporter, Path(config.getoption('--families')))
    if config.getoption('--conformance') is None:
        return
    found = {}
    for outcome in ('passed', 'failed', 'error'):
        for report in terminalreporter.stats.get(outcome, []):
            for preset, shown in (v for k, v in report.user_properties if k == 'conformance'):
                holds = found.setdefault(preset, {}).get(shown, True)
                found[preset][shown] = holds and outcome == 'passed'
    text = json.dumps(found, indent=1, sort_keys=True)
    Path(config.getoption('--conformance')).write_text(text + '\n', 'utf-8')


def _write_families(terminalreporter, path):
    """Write {family: {preset: {property: true, false or a word}}}, over what other runs found."""
    found, seen = json.loads(path.read_text()) if path.exists() else {}, set()
    for outcome in ('passed', 'failed', 'error'):
        for report in terminalreporter.stats.get(outcome, []):
            for family, preset, shown, holds in (
                v for k, v in report.user_properties if k == 'families'
            ):
                of = found.setdefault(family, {}).setdefault(preset, {})
                kept = of[shown] if (family, preset, shown) in seen else holds
                of[shown] = kept if outcome == 'passed' and kept is not False else False
                seen.add((family, preset, shown))
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + '\n', 'utf-8')
