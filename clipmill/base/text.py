"""Text of strangers, made fit to be shown: titles, ids, messages and file names come from the open internet."""

import re

# C0, DEL, C1, line and paragraph separators, and the marks that turn the direction of what follows.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# What takes no room, so that two different ids look alike; joiners stay, which scripts and emoji need.
_HIDDEN = re.compile(CONTROL.pattern[:-1] + "\u00ad\u200b\u2060-\u2065\ufeff\U000e0000-\U000e007f]")


def visible(text: str, keep: str = "") -> str:
    """Text that cannot steer a terminal and hides nothing: every such character as \\xNN, \\uNNNN or \\UNNNNNNNN.

    keep  characters that stay as they are, a line break for one
    """
    return _HIDDEN.sub(lambda found: found.group() if found.group() in keep else escaped(found.group()), text)


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
