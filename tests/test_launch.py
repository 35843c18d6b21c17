"""The launch scripts, without an installation: a fake stands in for Python, venv and pip."""

import os
import re
import shutil
import subprocess

import pytest
from machine import FAKE_PYTHON, ROOT

SCRIPTS = [*sorted((ROOT / 'launch').glob('*.sh')), ROOT / '.ci' / 'run']
REQUIREMENTS = ['requirements.txt', 'requirements-test.txt']

SCRIPT = """
set -euo pipefail
source ../launch/environment.sh
make_environment "$@"
echo "$python"
"""


def requirement_lines(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line.split('#')[0].strip() for line in lines if line.split('#')[0].strip()]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script):
    subprocess.run(['bash', '-n', script], check=True)


@pytest.mark.parametrize('name', REQUIREMENTS)
def test_every_requirement_is_pinned_once(name):
    lines = [line for line in requirement_lines(name) if not line.startswith('-r ')]
    assert all(re.fullmatch(r'[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*', line) for line in lines), lines
    names = [line.split('==')[0].lower().replace('_', '-') for line in lines]
    assert len(names) == len(set(names)) > 5


def test_runtime_needs_neither_torch_nor_cuda():
    names = ' '.join(requirement_lines('requirements.txt')).lower()
    assert not re.search(r'torch|nvidia|cuda|triton|tensorflow', names)
    assert '-r requirements.txt' in requirement_lines('requirements-test.txt')


@pytest.fixture
def checkout(tmp_path):
    """A checkout with launch/environment.sh, two requirements files and a fake Python."""
    (tmp_path / 'launch').mkdir()
    shutil.copy(ROOT / 'launch' / 'environment.sh', tmp_path / 'launch')
    (tmp_path / 'requirements.txt').write_text('one==1\n')
    (tmp_path / 'requirements-test.txt').write_text('-r requirements.txt\ntwo==2\n')
    fake = tmp_path / 'fake python'
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    (tmp_path / 'elsewhere').mkdir()

    def make(requirements, *options, **environ):
        """Calls make_environment from another directory; returns the process and the calls."""
        calls = tmp_path / 'calls'
        calls.write_text('')
        done = subprocess.run(
            ['bash', '-c', SCRIPT, 'bash', requirements, *options],
            cwd=tmp_path / 'elsewhere',
            env={'PATH': os.environ['PATH'], 'PYTHON': str(fake), 'CALLS': str(calls), **environ},
            capture_output=True,
            text=True,
        )
        return done, [call.split()[0] for call in calls.read_text().splitlines()]

    make.root = tmp_path
    return make


def test_environment_is_made_once(checkout):
    done, calls = checkout('requirements.txt')
    assert (done.returncode, calls) == (0, ['venv', 'install'])
    assert done.stdout.strip() == str(checkout.root / '.venv' / 'bin' / 'python')
    done, calls = checkout('requirements.txt')
    assert (done.returncode, calls, done.stderr) == (0, [], '')


def test_a_changed_file_is_installed_again_even_where_it_is_included(checkout):
    checkout('requirements-test.txt')
    (checkout.root / 'requirements.txt').write_text('one==1.1\n')
    assert checkout('requirements-test.txt')[1] == ['install']
    assert checkout('requirements-test.txt')[1] == []


def test_an_included_file_counts_as_installed(checkout):
    checkout('requirements.txt')
    assert checkout('requirements-test.txt')[1] == ['install']
    assert checkout('requirements.txt')[1] == []
    assert checkout('requirements-test.txt')[1] == []


def test_going_back_to_older_requirements_installs_them_again(checkout):
    checkout('requirements-test.txt')
    (checkout.root / 'requirements.txt').write_text('one==1.1\n')
    checkout('requirements.txt')
    (checkout.root / 'requirements.txt').write_text('one==1\n')
    assert checkout('requirements-test.txt')[1] == ['install']


def test_a_failed_installation_is_taken_up_again(checkout):
    done, calls = checkout('requirements.txt', BROKEN='yes')
    assert (done.returncode, calls) == (1, ['venv', 'install'])
    assert 'pip could not install requirements.txt' in done.stderr
    assert checkout('requirements.txt')[1] == ['install']


def test_half_installed_packages_are_forgotten_before_pip_runs(checkout):
    checkout('requirements.txt', BROKEN='yes')
    packages = checkout.root / '.venv' / 'lib' / 'python3.11' / 'site-packages'
    for name, complete in (('half-1.dist-info', False), ('whole-1.dist-info', True)):
        (packages / name).mkdir(parents=True)
        (packages / name / 'METADATA').write_text('Name: x')
        if complete:
            (packages / name / 'INSTALLER').write_text('pip')
    assert checkout('requirements.txt')[0].returncode == 0
    assert [path.name for path in packages.iterdir()] == ['whole-1.dist-info']


def test_an_environment_whose_python_is_gone_is_made_anew(checkout):
    checkout('requirements.txt')
    (checkout.root / '.venv' / 'bin' / 'python').unlink()
    (checkout.root / '.venv' / 'installed-requirements.txt').unlink()
    assert checkout('requirements.txt')[1] == ['venv', 'install']


def test_pip_options_are_passed_on(checkout):
    done, calls = checkout('requirements.txt', '--no-index')
    assert (done.returncode, calls) == (0, ['venv', 'install'])
    assert (checkout.root / 'calls').read_text().strip().endswith('requirements.txt --no-index')


def test_a_folder_that_is_no_environment_is_left_alone(checkout):
    mine = checkout.root / 'elsewhere' / 'mine'
    mine.mkdir()
    (mine / 'thesis.tex').write_text('')
    done, calls = checkout('requirements.txt', ADAPTERS_JAX_VENV='mine')
    assert (done.returncode, calls) == (1, [])
    assert f'{mine} exists and is not a virtual environment' in done.stderr
    assert (mine / 'thesis.tex').exists()


@pytest.mark.parametrize(
    ('body', 'found'), [('echo 3.9.2; exit 1', '(3.9.2)'), ('exit 127', '(does not run)')]
)
def test_an_unusable_python_is_named(checkout, body, found):
    old = checkout.root / 'old'
    old.write_text(f'#!/bin/sh\n{body}\n')
    old.chmod(0o755)
    done, calls = checkout('requirements.txt', PYTHON=str(old))
    assert (done.returncode, calls) == (1, [])
    assert 'Python 3.11 or newer' in done.stderr
    assert f'{old} {found}' in done.stderr


def test_interpreters_that_only_print_an_error_are_passed_over(checkout):
    folder = checkout.root / 'path'
    folder.mkdir()
    for name, body in (('python3.12', 'exit 127'), ('python3.11', 'echo 3.11.2; exit 1')):
        (folder / name).write_text(f'#!/bin/sh\n{body}\n')
        (folder / name).chmod(0o755)
    shutil.copy(checkout.root / 'fake python', folder / 'python3.13')
    done, calls = checkout('requirements.txt', PYTHON='', PATH=f'{folder}:/usr/bin:/bin')
    assert (done.returncode, calls) == (0, ['venv', 'install'])
    assert str(folder / 'python3.13') in done.stderr
