"""Libraries that are imported late, and without what they would drag in."""

import sys

import pytest

from adapters_jax.lazy import Functions

LIGHT, HEAVY = 'light_of_test_lazy', 'heavy_of_test_lazy'
SOURCE = f"""
try:
    import {HEAVY} as heavy
except ImportError:
    heavy = None


def found():
    return heavy is not None
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """A module that imports another where it finds it; neither is imported yet."""
    (tmp_path / f'{HEAVY}.py').write_text('')
    (tmp_path / f'{LIGHT}.py').write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in (LIGHT, HEAVY):
        sys.modules.pop(name, None)


def test_nothing_is_imported_before_a_call():
    functions = Functions(LIGHT)
    assert LIGHT not in sys.modules
    assert functions.found() and HEAVY in sys.modules


def test_what_a_library_can_do_without_is_not_found_and_can_be_imported_later():
    assert not Functions(LIGHT, without=HEAVY).found()
    assert HEAVY not in sys.modules
    assert __import__(HEAVY)


def test_what_somebody_has_imported_stays_there():
    before = __import__(HEAVY)
    assert Functions(LIGHT, without=HEAVY).found()
    assert sys.modules[HEAVY] is before
