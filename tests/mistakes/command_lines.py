"""Command lines that would work, for the tests to spoil.

`command.refused` checks the form of what is said: one clear sentence, status 2, no traceback. Each
test checks that the sentence names the value and what was expected, and that nothing was begun.
"""

import command


class Line:
    """The command line of a training run that would work, to be spoilt by each test."""

    def __init__(self, toys, tmp_path):
        self.folder, self.toys = tmp_path, toys
        self.workdir = tmp_path / 'workdir'

    def arguments(self, *changes, file='text_classification', workdir=None):
        name, _, argument = file.partition(':')
        given = [f'--config=configs/{name}.py:{argument or "method=head"}']
        given += [f'--workdir={workdir or self.workdir}']
        given += [f'--config.backbone={self.toys / "bert"}', '--config.data.cache_dir=none']
        given += [f'--config.data.train={self.toys / "texts.csv"}', '--config.mesh.data=1']
        return [*given, '--config.training.epochs=1', *changes]

    def refused(self, *changes, **options):
        """Return the sentence; nothing must have been trained or promised."""
        names = ('file', 'workdir')
        given = {name: options.pop(name) for name in names if name in options}
        arguments = self.arguments(*changes, **given)
        sentence = command.refused('train', *arguments, folder=self.folder / 'out', **options)
        left = {path.name for path in self.workdir.glob('*')}
        assert left <= {'.lock'}, left
        return sentence


def predict_line(adapter, folder, *more, content='{"text": "the cat"}\n'):
    """Return the arguments of a prediction that would work, for `content` as its input."""
    (folder / 'in.jsonl').write_bytes(content.encode('utf-8', 'surrogateescape'))
    files = (f'--input={folder / "in.jsonl"}', f'--output={folder / "out.jsonl"}')
    return (f'--adapter={adapter}', *files, *more)
