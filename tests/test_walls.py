"""What may know what: rooms use those below them; adapters and models do not know each other."""

import ast
import re
from pathlib import Path

import pytest

from adapters_jax.adapters import presets
from adapters_jax.models.families import FAMILIES

PACKAGE = Path(__file__).parents[1] / 'adapters_jax'
# From the ground floor upwards; the rooms of one floor stand side by side.
FLOORS = [
    {'models', 'adapters', 'decoding'},
    {'interop'},
    {'data'},
    {'tasks'},
    {'training'},
    {'tuning'},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(path for room in FLOOR for path in (PACKAGE / room).rglob('*.py'))
COMMANDS = {path.stem for path in PACKAGE.glob('*.py') if 'entry.run' in path.read_text()}
# To tag words with an adapter is to predict.
UPWARDS = {('training/preprocessing.py', 'adapters_jax.predict.predict')}


def imported(path):
    """Return the modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not getattr(node, 'level', 0), f'{path} has a relative import'
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('adapters_jax'):
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith('adapters_jax')}
    return found


def words(path):
    """Return the words of a file's names and strings, but not those of comments and docstrings."""
    tree = ast.parse(path.read_text())
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set() if id(node) in prose else set(re.split(r'[^a-z0-9_+-]+', node.value))
    return {word.lower() for word in found}


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    name = str(path.relative_to(PACKAGE))
    room = path.relative_to(PACKAGE).parts[0]
    for module in imported(path):
        other = module.split('.')[1] if '.' in module else ''
        told = f'{path.name} of {room} imports {module}'
        assert other not in COMMANDS or (name, module) in UPWARDS, told
        assert other not in FLOOR or other == room or FLOOR[other] < FLOOR[room], told


def test_commands_are_known():
    assert {'train', 'evaluate', 'predict', 'sweep', 'convert'} <= COMMANDS


def test_adapters_name_no_family_and_models_no_method():
    # 'bert' is also what `adapters` calls a way of drawing first values.
    families = set(FAMILIES) - {'bert'}
    # Words of plain English that methods are called by.
    methods = set(presets.PRESETS) - {'full', 'head', 'attention', 'layer_norm'}
    for room, forbidden in (('adapters', families), ('models', methods)):
        for path in (PACKAGE / room).rglob('*.py'):
            mentioned = words(path) & forbidden
            assert not mentioned, f'{room}/{path.name} mentions {", ".join(sorted(mentioned))}'
            others = {module.split('.')[1] for module in imported(path) if '.' in module}
            assert {'adapters', 'models'} & (others - {room}) == set(), path.name
