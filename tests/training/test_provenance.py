"""Which code made a number, told by git or, of a copy without history, by the environment."""

import subprocess

import pytest

from adapters_jax.training import provenance


@pytest.fixture
def without_history(monkeypatch):
    """A copy in which git finds no repository."""

    def run(command, **_):
        raise subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(provenance.subprocess, 'run', run)


def test_a_copy_without_history_is_of_the_commit_that_it_is_told(without_history, monkeypatch):
    monkeypatch.setenv('ADAPTERS_JAX_COMMIT', 'abc123')
    assert provenance.commit() == 'abc123'
    monkeypatch.delenv('ADAPTERS_JAX_COMMIT')
    assert provenance.commit() == 'unknown'


def test_what_git_says_goes_before_what_is_told(monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout='def456+\n')
    monkeypatch.setattr(provenance.subprocess, 'run', lambda *_, **__: done)
    monkeypatch.setenv('ADAPTERS_JAX_COMMIT', 'abc123')
    assert provenance.commit() == 'def456+'
