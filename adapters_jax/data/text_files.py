"""Reads a local table (CSV, TSV, text, JSON, JSONL, Parquet; gzip too) a line at a time.

Quotes are where table readers silently go wrong. In a CSV file they delimit fields; in the TSV
files of GLUE they are ordinary characters, often unbalanced, and a reader that takes them for
delimiters swallows whole lines. So each format has one rule (`Layout.quoting`), the number of
fields of every line is checked, and each record keeps its line number for the error messages.

A JSON file may hold the lists of several splits: FILE.json#KEY names one of them,
FILE.json#KEY+KEY two, one after the other.
"""

import codecs
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import pyarrow
import pyarrow.parquet

DELIMITERS = {'.csv': ',', '.tsv': '\t', '.tab': '\t'}
OBJECTS = ('.jsonl', '.json', '.parquet')  # whose records name their columns themselves
SUFFIXES = ('.csv', '.tsv', '.tab', '.txt', *OBJECTS)

# Python's own limit of 128 KiB a field would refuse long documents.
csv.field_size_limit(max(csv.field_size_limit(), 2**24))

Record = tuple[int, Sequence[Any] | Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to read a file where its suffix does not say.

    delimiter: '' means by suffix (for .txt: tab where the first line has one, else none, so that
        each line is one text). Another one than tab divides the lines of a .txt file once, which
        reads the common 'LABEL text' with ' '. Backslash and t, as a shell passes them, are a tab.
    header: True, False, or a function that decides from the cells of the first line.
    quoting: 'csv' (quotes delimit fields), 'none' (quotes are text), 'auto' ('csv' for .csv, else
        'none').
    """

    encoding: str = 'utf-8-sig'
    delimiter: str = ''
    header: bool | Callable[[list[str]], bool] = True
    quoting: str = 'auto'

    def __post_init__(self):
        object.__setattr__(self, 'delimiter', self.delimiter.replace('\\t', '\t'))
        if self.quoting not in ('auto', 'csv', 'none'):
            raise ValueError(
                f"data.quoting is {self.quoting!r}; it must be 'auto', 'csv' or 'none'."
            )
        try:
            ''.encode(self.encoding)  # unlike a look-up this refuses what is none of texts: base64
        except (LookupError, UnicodeError):
            raise ValueError(
                f'data.encoding is {self.encoding!r}, which is not an encoding known to Python; '
                "use for instance 'utf-8-sig' or 'latin-1'."
            ) from None


@dataclasses.dataclass(frozen=True)
class Table:
    """The column names of a file and its records, each with its line number (one pass only)."""

    path: pathlib.Path
    names: list[str]
    records: Iterator[Record]

    def read(
        self, columns: Mapping[str, str], skip_broken: bool = False
    ) -> tuple[dict[str, list], list[int]]:
        """The chosen columns, {key: column name} -> {key: values}, and the line numbers.

        skip_broken leaves out lines with a wrong number of fields instead of raising.
        Raises ValueError naming the line, or where there is none.
        """
        self._refuse_twins(columns.values())
        places = [self.names.index(name) for name in columns.values()]
        keys = list(columns.values())
        picked: list[list] = [[] for _ in keys]
        lines = []
        with _readable(self.path):
            for line, record in self.records:
                if isinstance(record, Mapping):
                    values = [record.get(key) for key in keys]
                elif len(record) == len(self.names):
                    values = [record[place] for place in places]
                elif skip_broken:
                    continue
                else:
                    raise ValueError(self._wrong_width(line, len(record)))
                lines.append(line)
                for column, value in zip(picked, values, strict=True):
                    column.append(value)
        if not lines:
            raise ValueError(f'{self.path} has no examples; it must hold at least one.')
        return dict(zip(columns, picked, strict=True)), lines

    def objects(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Each record as an object, with its line number. Raises ValueError naming the line."""
        self._refuse_twins(name for name in self.names if name)
        with _readable(self.path):
            for line, record in self.records:
                if isinstance(record, Mapping):
                    yield line, record
                elif len(record) == len(self.names):
                    yield line, dict(zip(self.names, record, strict=True))
                else:
                    raise ValueError(self._wrong_width(line, len(record)))

    def _refuse_twins(self, wanted: Iterable[str]) -> None:
        twins = [name for name in wanted if self.names.count(name) > 1]
        if twins:
            raise ValueError(
                f'{self.path}: {self.names.count(twins[0])} columns have the name {twins[0]!r}; '
                'give each a name of its own.'
            )

    def _wrong_width(self, line: int, width: int) -> str:
        return (
            f'{self.path}, line {line}: {width} fields where the first line has {len(self.names)}. '
            'Mend the line, or set data.delimiter or data.quoting if the file is laid out '
            'differently.'
        )


def open_table(path: pathlib.Path, layout: Layout) -> Table:
    """Opens a file by its suffix; with a delimiter set, one of any other suffix is text.

    Raises ValueError where it is of no known kind or is empty.
    """
    suffix = suffix_of(path)
    readers = {'.jsonl': _jsonl, '.json': _json, '.parquet': _parquet}
    if suffix not in SUFFIXES:
        if not layout.delimiter:
            raise ValueError(
                f'{path} is of no kind known here; known are {", ".join(SUFFIXES)} (.gz). If it is '
                'text, set data.delimiter to what stands between its columns.'
            )
        suffix = '.txt'
    if suffix in readers:
        return readers[suffix](path, layout)
    with _readable(path):
        return _delimited(path, layout, suffix)


def read_lines(path: pathlib.Path, encoding: str) -> list[str]:
    """The lines of a text file without their line feeds; carriage returns stay.

    Raises ValueError where it is not in that encoding, or is a damaged .gz file.
    """
    with _readable(path), _open(path, encoding, '\n') as file:
        return file.read().split('\n')


def suffix_of(path: pathlib.Path) -> str:
    """The ending that says what a file holds: '.json' of 'A.JSON.gz'."""
    name = file_of(path)[0].name.lower().removesuffix('.gz')
    return pathlib.PurePath(name).suffix


def file_of(path: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The file of FILE#KEY+KEY and the keys; a file whose own name is such has none."""
    name, _, keys = path.name.partition('#')
    if not keys or path.exists():
        return path, []
    return path.with_name(name), keys.split('+')


def _open(path: pathlib.Path, encoding: str, newline: str) -> IO[str]:
    return _opener(path)(path, 'rt', encoding=encoding, newline=newline)


def _opener(path: pathlib.Path) -> Callable[..., IO[Any]]:
    return gzip.open if path.name.lower().endswith('.gz') else open


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Says of a file what is wrong with it where its bytes are no text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(_not_decodable(path, error)) from None
    except UnicodeError as error:  # of UTF-16, whose first bytes tell their order
        raise ValueError(
            f'{path}: {error}; set data.encoding to what it is in, for instance to utf-16-le or '
            'utf-8-sig.'
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f'{path} is no whole gzip file ({error}); fetch it again.') from None


def _not_decodable(path: pathlib.Path, error: UnicodeDecodeError) -> str:
    # What a spreadsheet saves as Unicode text; as Latin-1 it would be read, and be nonsense.
    wide = error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return (
        f'{path} is not {error.encoding} (byte {error.object[error.start]:#04x}: {error.reason}); '
        f'set data.encoding, for instance to {"utf-16" if wide else "latin-1"!r}.'
    )


def _delimited(path: pathlib.Path, layout: Layout, suffix: str) -> Table:
    delimiter = layout.delimiter or DELIMITERS.get(suffix) or _sniff(path, layout.encoding)
    quoted = layout.quoting == 'csv' or (layout.quoting == 'auto' and suffix == '.csv')
    # A text file with another delimiter than tab is 'LABEL text': only its first one divides.
    divisions = 1 if suffix == '.txt' and delimiter not in ('', '\t') else -1
    if quoted and len(delimiter) > 1:
        raise ValueError(
            f'data.delimiter is {delimiter!r}, but between the quoted fields of {path} one '
            "character must stand; set that, or data.quoting='none' where quotes are text."
        )
    if quoted:
        records = _quoted(path, layout.encoding, delimiter)
    else:
        records = _literal(path, layout.encoding, delimiter, divisions)
    first = next(records, None)
    if first is None:
        raise ValueError(f'{path} is empty; it must hold at least one example.')
    cells = list(first[1])
    header = layout.header(cells) if callable(layout.header) else layout.header
    if header:
        return Table(path, [cell.strip() for cell in cells], records)
    return Table(path, [str(i) for i in range(len(cells))], itertools.chain([first], records))


def _sniff(path: pathlib.Path, encoding: str) -> str:
    with _open(path, encoding, '\n') as file:
        return '\t' if '\t' in file.readline() else ''


def _literal(path: pathlib.Path, encoding: str, delimiter: str, divisions: int) -> Iterator[Record]:
    # newline='\n': a lone carriage return or a Unicode line separator inside a text ends no line.
    with _open(path, encoding, '\n') as file:
        for number, line in enumerate(file, start=1):
            line = line.rstrip('\r\n')
            if line:
                yield number, line.split(delimiter, divisions) if delimiter else [line]


def _quoted(path: pathlib.Path, encoding: str, delimiter: str) -> Iterator[Record]:
    with _open(path, encoding, '') as file:
        reader = csv.reader(file, delimiter=delimiter or ',', strict=True)
        begin = 1
        try:
            for fields in reader:
                if fields:
                    yield begin, fields
                begin = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f'{path}, line {begin}: {error}. Probably a quotation mark is missing there; if '
                "quotation marks are ordinary characters in this file, set data.quoting='none'."
            ) from None


def _jsonl(path: pathlib.Path, layout: Layout) -> Table:
    def records() -> Iterator[Record]:
        with _open(path, layout.encoding, '\n') as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line.rstrip(), path, number)

    return _of_objects(path, records())


def read_json(path: pathlib.Path, encoding: str) -> Any:
    """What a JSON file holds. Raises ValueError where it is none, naming the line."""
    with _readable(path), _open(path, encoding, '\n') as file:
        text = file.read()
    first, _, more = text.strip().partition('\n')
    if more and _is_object(first):
        raise ValueError(
            f'{path} holds an object on its first line and more after it, where one JSON value '
            'must stand; if it has one object a line, let its name end in .jsonl.'
        )
    return _parse(text, path, 1)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _json(path: pathlib.Path, layout: Layout) -> Table:
    file, keys = file_of(path)
    held = read_json(file, layout.encoding)
    lists = {k: v for k, v in held.items() if _holds_rows(v)} if isinstance(held, dict) else {}
    if any(key not in lists for key in keys) or (lists and not keys):
        raise ValueError(
            f'{path}: name the lists to read, as in {file.name}#{next(iter(lists), "train")}; the '
            f'file has {", ".join(lists) or "none"}.'
        )
    rows = [row for key in keys for row in lists[key]] if keys else held
    if not isinstance(rows, list):
        raise ValueError(
            f'{path} must hold a list of objects, one for each row; for one object a line use '
            '.jsonl.'
        )
    return _of_objects(path, iter(enumerate(rows, start=1)))


def _holds_rows(value: Any) -> bool:
    """Whether it is a list of rows, perhaps with a mistake, and not of a column's values."""
    if not isinstance(value, list):
        return False
    return not value or any(isinstance(row, dict | list) for row in value)


def _parse(text: str, path: pathlib.Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = line + error.lineno - 1
        raise ValueError(f'{path}, line {place}: not JSON ({error.msg}).') from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, say
        raise ValueError(f'{path}, line {line}: JSON beyond what can be read ({error}).') from None


def _of_objects(path: pathlib.Path, records: Iterator[Record]) -> Table:
    def checked() -> Iterator[Record]:
        for number, record in records:
            if isinstance(record, list):  # as with the fields of a line, places are the names
                record = {str(place): value for place, value in enumerate(record)}
            if not isinstance(record, dict):
                raise ValueError(f'{path}, entry {number}: {record!r} where an object must stand.')
            yield number, record

    with _readable(path):
        rows = list(checked())
    if not rows:
        raise ValueError(f'{path} is empty; it must hold at least one example.')
    # Not every object has every name.
    return Table(path, list(dict.fromkeys(n for _, row in rows for n in row)), iter(rows))


def _parquet(path: pathlib.Path, layout: Layout) -> Table:
    del layout  # a Parquet file says all of this itself
    # Parquet is read from its end, so what is compressed is taken whole.
    with _readable(path), _opener(path)(path, 'rb') as file:
        content = io.BytesIO(file.read())
    try:
        rows = pyarrow.parquet.read_table(content).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f'{path} is no whole Parquet file ({error}); fetch it again.') from None
    except (ValueError, OverflowError) as error:  # what Arrow holds and Python does not
        raise ValueError(
            f'{path} holds a text that is not UTF-8, or a date beyond the year 9999 ({error}); '
            'mend it, or leave out its column.'
        ) from None
    return _of_objects(path, iter(enumerate(rows, start=1)))
