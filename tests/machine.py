"""A machine for the launch scripts: a copy of them, and a PATH on which fakes stand for the tools.

Nothing is installed, and no cloud is asked.
"""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / 'launch'
SYSTEM = ('bash', 'cat', 'cmp', 'cp', 'dirname', 'env', 'flock', 'git', 'hostname', 'ls', 'mkdir')
SYSTEM += ('mktemp', 'nohup', 'rm', 'sed', 'sleep', 'touch', 'tr', 'wc')

# `-m venv DIR` makes DIR/bin/python a copy of the fake; each call of venv, pip or a command of ours
# is written to $CALLS, and pip fails where $BROKEN is set.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *"-m venv"*) for folder; do :; done
    mkdir -p "$folder/bin" && touch "$folder/pyvenv.cfg" && cp "$0" "$folder/bin/python"
    echo "venv" >>"$CALLS" ;;
  *"pip install"*) echo "install $*" >>"$CALLS"; [ -z "${BROKEN:-}" ] || exit 1 ;;
  *version_info*) echo 3.11.7 ;;
  *"-m adapters_jax."* | *"-m experiments."*) echo "ran $*" >>"$CALLS" ;;
esac
"""


class Machine:
    """A folder with a checkout's scripts and a PATH of fakes; `run` runs a script on it."""

    def __init__(self, folder):
        self.root, self.path = folder / 'checkout', folder / 'path'
        self.calls = folder / 'calls'
        shutil.copytree(LAUNCH, self.root / 'launch', ignore=shutil.ignore_patterns('env'))
        (self.root / 'requirements.txt').write_text('jax==9.8.7\n')
        self.path.mkdir()
        for name in SYSTEM:
            # Not a link: what is written to that would be written to the system's own command.
            if shutil.which(name):
                self.fake(name, f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
        self.fake('python3.12', FAKE_PYTHON)

    def fake(self, name, body):
        """Put a command on the PATH; a body of None writes its words to the calls, a line each."""
        if body is None:
            body = f'{{ printf %s {name}; printf " <%s>" "$@"; echo; }} >>"$CALLS"'
        text = body if body.startswith('#!') else f'#!/usr/bin/env bash\n{body}'
        path = self.path / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script, *arguments, cwd=None, **environ):
        """Return the process and the calls of the fakes; `cwd` is the checkout's parent."""
        self.calls.write_text('')
        env = {'PATH': str(self.path), 'CALLS': str(self.calls), 'HOME': str(self.root), **environ}
        line = ['bash', str(self.root / 'launch' / script), *arguments]
        cwd = cwd or self.root.parent
        done = subprocess.run(line, env=env, cwd=cwd, capture_output=True, text=True)
        return done, self.calls.read_text().splitlines()

    def commands(self, *arguments, **environ):
        """Return what run.sh said, and the command line that it became."""
        done, calls = self.run('run.sh', *arguments, **environ)
        assert done.returncode == 0, done.stderr
        return done.stderr, [call.removeprefix('ran ') for call in calls if call.startswith('ran')]
