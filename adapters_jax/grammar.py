"""The one-line notation for methods and steps: `name[option=value,option=value]|name`.

It serves flags and tables, where JSON would be a nuisance to write: `pfeiffer[reduction_factor=8]`,
`houlsby[size=64,leave_out=[0,1]]`, `seq_bn[reduction_factor={0: 8, default: 16}]`. Values are
numbers, True, False, None, text (bare, as names and paths may be, or quoted), lists and dicts of
these.
"""

import ast
import re
from typing import Any

_OPEN, _CLOSE, _QUOTES = '[{', ']}', '\'"'
_CONSTANTS = {'true': True, 'false': False, 'none': None, 'null': None}
_BARE = re.compile(r'([A-Za-z_/]|\.{1,2}/)[\w./:+-]*')
_INTEGER = re.compile(r'[+-]?\d+')
_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
_NAMED = re.compile(r'\s*([A-Za-z_][\w+-]*)\s*(?:\[(.*)\])?\s*', re.DOTALL)


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the options of each part that `text` joins with '|'.

    Raises:
        ValueError: text that does not follow the notation; the part at fault is quoted.
    """
    return [parse_one(part) for part in split(text, '|')]


def parse_one(text: str, what: str = 'method') -> tuple[str, dict[str, Any]]:
    """Return the name and the options that `text` writes; `what` says of what, in the error.

    Raises:
        ValueError: text that does not follow the notation; the part at fault is quoted.
    """
    match = _NAMED.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not a {what}; expected name or name[option=value,...]')
    options: dict[str, Any] = {}
    for item in _items(match[2] or ''):
        name, equals, value = item.partition('=')
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ValueError(f'{item.strip()!r} in {text!r} is not an option; expected name=value')
        if name in options:
            raise ValueError(f'{text!r} gives the option {name!r} twice')
        options[name] = parse_value(value)
    return match[1], options


def parse_value(text: str) -> Any:
    """Return the value that `text` writes; dict keys are always text.

    Raises:
        ValueError: text that writes no value.
    """
    text = text.strip()
    if text.startswith('[') and text.endswith(']'):
        return [parse_value(item) for item in _items(text[1:-1])]
    if text.startswith('{') and text.endswith('}'):
        return _parse_dict(text)
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if _BARE.fullmatch(text):
        return text
    if text[:1] in _QUOTES and text[:1]:
        return _unquote(text)
    raise ValueError(
        f'{text!r} is not a value; expected a number, True, False, None, text, a list or a dict'
    )


def _parse_dict(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in map(_parse_entry, _items(text[1:-1])):
        if key in found:
            raise ValueError(f'{text!r} gives the key {key!r} twice')
        found[key] = value
    return found


def _parse_entry(text: str) -> tuple[str, Any]:
    key, colon, value = text.partition(':')
    if not colon:
        raise ValueError(f'{text.strip()!r} is not an entry of a dict; expected key: value')
    return str(parse_value(key)), parse_value(value)


def _unquote(text: str) -> str:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'{text!r} is not quoted text: {error}') from error
    if not isinstance(value, str):
        raise ValueError(f'{text!r} is not quoted text')
    return value


def _items(text: str) -> list[str]:
    return split(text, ',') if text.strip() else []


def split(text: str, separator: str) -> list[str]:
    """Split at a one-letter separator that is outside of brackets and quotes.

    Raises:
        ValueError: a bracket or quote without its partner.
    """
    parts, start, closers, quote, escaped = [], 0, [], '', False
    for i, letter in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif letter == '\\':
                escaped = True
            elif letter == quote:
                quote = ''
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPEN:
            closers.append(_CLOSE[_OPEN.index(letter)])
        elif letter in _CLOSE:
            if not closers or closers.pop() != letter:
                raise ValueError(f'{text!r} has a {letter!r} without its partner')
        elif letter == separator and not closers:
            parts.append(text[start:i])
            start = i + 1
    if quote or closers:
        raise ValueError(f'{text!r} ends where {quote or closers[-1]!r} is expected')
    return [*parts, text[start:]]
