"""What all command lines share: flags, logging, and one clear sentence for a user's mistake."""

import contextlib
import faulthandler
import logging
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging

from adapters_jax import allocator, processes, programs
from adapters_jax.config import Config, from_json
from adapters_jax.data.pipeline import HungWorkerError, WorkerError
from adapters_jax.files import InUseError

# What a mistake in a config, a file or a folder raises; anything else is a defect of ours and
# keeps its traceback.
MISTAKES = (
    ValueError,
    OSError,
    FloatingPointError,
    InUseError,
    WorkerError,
    processes.ElsewhereError,
    flags.Error,
)
Define = Callable[[], dict[str, flags.FlagHolder]]
_ENDING = (signal.SIGTERM, signal.SIGINT)
_AGAIN_S = 0.02  # until a signal is sent again whose error could not be raised where it came
# Of transformers a command needs tokenizers, but it imports each framework that it finds: torch and
# what comes with it for some four seconds. One who wants it all the same says USE_TORCH=1.
_WITHOUT = ('USE_TORCH', 'USE_TF', 'USE_JAX')


def without_frameworks() -> None:
    """Keep transformers, which is not imported yet, from importing torch and the like."""
    for framework in _WITHOUT:
        os.environ.setdefault(framework, '0')


def run_on_many(define: Define, main: Callable[..., None]) -> None:
    """As `run`, for a command that several processes may run together.

    It takes --distributed, --processes and --process; the first process alone prints what `main`
    does.
    """

    def joined(distributed: str, processes_: int, process: int, **values: Any) -> None:
        processes.initialise(distributed, processes_, process)
        if jax.process_count() > 1:
            # Once another process has ended alone JAX ends this one: where it was is no news.
            faulthandler.disable()
        try:
            with _leaving(), _silent_unless(processes.is_writer()):
                main(**values)
        finally:
            processes.leave()

    run(lambda: define() | _define_processes(), joined)


def _define_processes() -> dict[str, flags.FlagHolder]:
    distributed = flags.DEFINE_string(
        'distributed',
        '',
        'none, auto (SLURM, Open MPI, Cloud TPU, GKE, Kubernetes), or HOST:PORT of process 0; '
        'default: ADAPTERS_JAX_DISTRIBUTED, or none.',
    )
    count = flags.DEFINE_integer(
        'processes', 0, 'How many, with HOST:PORT; default: ADAPTERS_JAX_PROCESSES.'
    )
    process = flags.DEFINE_integer(
        'process', -1, 'Which one this is, with HOST:PORT; default: ADAPTERS_JAX_PROCESS.'
    )
    return {'distributed': distributed, 'processes_': count, 'process': process}


@contextlib.contextmanager
def _silent_unless(writer: bool) -> Iterator[None]:
    """Keep stdout, and our own messages, to the first process."""
    if writer:
        yield
        return
    logging.getLogger('adapters_jax').setLevel(logging.ERROR)
    with Path(os.devnull).open('w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """End a process that has failed alone at once, where others would wait for it.

    JAX's own way out waits for all processes to come there, and they wait for this one's part of a
    step; once it is gone, JAX ends them.
    """
    try:
        yield
    except (SystemExit, processes.ElsewhereError):
        raise
    except BaseException as error:
        if jax.process_count() == 1 or processes.is_told(error):
            raise
        if isinstance(error, MISTAKES):
            print(f'error: process {jax.process_index()}: {error}', file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, MISTAKES) else 1)


def run(define: Define, main: Callable[..., None]) -> None:
    """Define the flags, parse the command line and call `main` with the flags' values.

    A user's mistake ends the process with status 2 and its sentence; `--traceback` shows where it
    was noticed. Flags are defined here and not on import, so that modules can be imported together.
    """
    holders = define()
    for holder in holders.values():  # so that --help shows them, whichever module defines them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    show = flags.DEFINE_bool('traceback', False, 'Show where a mistake was noticed.')
    # JAX's own options (--jax_platforms, ...) become flags of each command.
    jax.config.config_with_absl()

    def parse(argv: Sequence[str]) -> list[str]:
        with _told(lambda: '--traceback' in argv):
            # A config's flags look for the config there, not in what is parsed.
            sys.argv[:] = argv = config_first(argv)
            check_overrides(argv)
            rest = flags.FLAGS(argv)
            if len(rest) > 1:
                raise ValueError(f'unexpected argument {rest[1]!r}; options begin with --')
            return rest

    def guarded(_: Sequence[str]) -> None:
        for number in _ENDING:
            signal.signal(number, _end)
        _set_up_logging()
        programs.keep()
        without_frameworks()
        allocator.keep_freed()
        with _told(lambda: show.value):
            absent = [f'--{name}' for name, holder in holders.items() if _is_absent(holder)]
            if absent:
                raise ValueError(f'{" and ".join(absent)} must be given; --help shows all options')
            values = {name: _at_home(holder.value) for name, holder in holders.items()}
            for config in (value for value in values.values() if isinstance(value, Config)):
                from_json(config.to_dict())  # the flags library looks at no item of a tuple
            main(**values)

    sys.unraisablehook = _report_unless_late
    app.run(guarded, flags_parser=parse)


def _is_absent(flag: flags.FlagHolder) -> bool:
    # An empty one is a shell's variable that is not set, and would be the current directory.
    return flag.value is None or (flag.default is None and flag.value in ('', []))


def _at_home(value: Any) -> Any:
    """Return a flag's value with '~' as a shell has it, which leaves it to us after a '='."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    from_home = isinstance(value, str) and value.startswith('~/')
    return str(Path(value).expanduser()) if from_home else value


def _end(number: int, _: Any) -> None:
    """End the process in order, so that temporary files go: it has no state to save by now."""
    name = signal.Signals(number).name
    # Not `print`: the signal may have come in the middle of one.
    os.write(2, f'stopped by {name} with nothing to save; give the same command again\n'.encode())
    _leave(number)


def _leave(number: int, _: Any = None) -> None:
    if jax.distributed.is_initialized():
        # In order would be together with the others, who know nothing of it.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(128 + number)


@contextlib.contextmanager
def _told(show_traceback: Callable[[], bool]) -> Iterator[None]:
    """Turn a user's mistake into its sentence on stderr and exit status 2."""
    try:
        yield
    except MISTAKES as error:
        if show_traceback():
            traceback.print_exc()
        # What another process has told, one of those that were told it repeats.
        if not isinstance(error, processes.ElsewhereError) or processes.is_writer():
            with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
                print(f'error: {str(error) or type(error).__name__}', file=sys.stderr, flush=True)
        if isinstance(error, HungWorkerError):
            os._exit(2)  # sys.exit would wait for the worker
        sys.exit(2)


def _report_unless_late(unraisable: Any) -> None:
    """Report an error that nobody can catch, but not the echo of one that has been told already.

    When one write of a checkpoint fails, TensorStore's threads report each other one that was under
    way to an event loop that is gone by then. Of a signal that came in such a place, as JAX's
    callback of the garbage collector is, the process ends a moment later.
    """
    error = unraisable.exc_value
    if isinstance(error, SystemExit) and error.code in [128 + number for number in _ENDING]:
        number = error.code - 128
        signal.signal(number, _leave)  # the sentence has been said
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    if not (isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'):
        sys.__unraisablehook__(unraisable)


def load_config(text: str) -> Config:
    """Return the config of `FILE.py[:argument]`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an argument that the file does not take, or a file that is no config.
    """
    name, _, argument = text.partition(':')
    path = Path(name)
    if not path.is_file():
        beside = sorted(str(other) for other in path.parent.glob('*.py'))
        raise FileNotFoundError(
            f'--config: there is no file {name}; {path.parent} holds {", ".join(beside) or "none"}'
        )
    try:
        get_config = runpy.run_path(str(path)).get('get_config')
        if get_config is None:
            raise ValueError(f'--config: {name} defines no function get_config')
        config = get_config(argument or None)
    except (SyntaxError, ImportError, AttributeError, NameError, TypeError, KeyError) as error:
        said = (str(error).splitlines() or [''])[0][:200]
        raise ValueError(
            f'--config: {name} fails{_line_in(path, error)}: {type(error).__name__}: {said}'
        ) from error
    if not isinstance(config, Config):
        raise ValueError(
            f'--config: get_config of {name} returns a {type(config).__name__}; expected what '
            '`adapters_jax.config.base()` returns, changed'
        )
    return config


def _line_in(path: Path, error: BaseException) -> str:
    """Return the last line of a file that an error passed, in words."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f' in line {lines[-1]}' if lines else ''


def config_first(argv: Sequence[str]) -> list[str]:
    """Return the command line with `--config=FILE` at its front, however and wherever it stood.

    What is set of a config is parsed by the flags library only after the config.
    """
    first, rest, arguments = [], [], iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.partition('=')
        if name not in ('--config', '-config'):
            rest.append(argument)
        elif not equals and (value := next(arguments, None)) is None:
            rest.append(argument)  # which the library refuses
        else:
            first.append(f'--config={value}')
    if len(first) > 1:
        raise ValueError(f'{" and ".join(first)} are given; expected one --config')
    return [*argv[:1], *first, *rest]


def check_overrides(argv: Sequence[str]) -> None:
    """Refuse `--config.KEY=...` for keys that the config file's result does not have.

    The flags library would refuse them too, but with a traceback and without the known keys.

    Raises:
        ValueError: naming the keys that there are at that level.
    """
    given = dict(
        argument.lstrip('-').partition('=')[::2] for argument in argv if argument.startswith('-')
    )
    if not given.get('config'):
        return
    config = load_config(given['config'])
    for key in (name for name in given if name.startswith('config.')):
        node: Any = config
        for part in key.split('.')[1:]:
            if not isinstance(node, Config) or part not in node:
                known = ', '.join(sorted(node)) if isinstance(node, Config) else 'nothing below it'
                raise ValueError(f'unknown config key --{key}: no {part!r} here; known: {known}')
            node = node[part]


def _set_up_logging() -> None:
    """Our own messages from INFO, those of libraries from WARNING, without time stamps."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)
    ours = logging.getLogger('adapters_jax')
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    ours.handlers = [handler]


def table(rows: dict[str, Any]) -> str:
    """Return names and values in two columns; numbers with a fraction get four digits."""
    width = max(map(len, rows), default=0)
    shown = {k: f'{v:.4f}' if isinstance(v, float) else str(v) for k, v in rows.items()}
    return '\n'.join(f'  {name:<{width}}  {value}' for name, value in shown.items())
