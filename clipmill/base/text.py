"""Untrusted text made safe to print or to put into SQL: titles, ids, messages and file names come from the internet."""

import re
from pathlib import Path

# C0, DEL, C1, line and paragraph separators, and marks that change the direction of the text that follows.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# Characters without width, which make two different ids look alike; joiners stay, since scripts and emoji need them.
_HIDDEN = re.compile(CONTROL.pattern[:-1] + "\u00ad\u200b\u2060-\u2065\ufeff\U000e0000-\U000e007f]")


def visible(text: str, keep: str = "") -> str:
    """Return text that cannot control a terminal: control and invisible characters become \\xNN, \\uNNNN, \\UNNNNNNNN.

    keep  characters that stay as they are, for example a line break
    """
    return _HIDDEN.sub(lambda found: found.group() if found.group() in keep else escaped(found.group()), text)


def escaped(character: str) -> str:
    """Return one character as the escape sequence that `visible` shows."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def sql_literal(value: str | Path) -> str:
    """Return a string literal of SQL, with its quotes."""
    return "'" + str(value).replace("'", "''") + "'"


def sql_identifier(name: str) -> str:
    """Return a name of a table or column as SQL, with its quotes."""
    return '"' + name.replace('"', '""') + '"'
