"""Secrets of settings: a setting names where a secret is, and corpus.yaml never holds the secret itself.

$NAME        an environment variable of the command's process
file:PATH    the text of a file
kept:ID      a file in this user's state folder (`clipmill.base.user_state`), where a secret is moved that was given as
             plain text

The driver reads secrets when it starts work; workers get them with their tasks.
"""

import os
import re
import uuid
from pathlib import Path
from typing import Any

from clipmill.base.credentials import credentials_in_url, is_secret_name
from clipmill.base.errors import UserError
from clipmill.base.user_state import user_state, write_private

REFERENCE = r"\$[A-Za-z_][A-Za-z0-9_]*|file:[^/\n\"][^\n\"]*|file:/[^/\n\"][^\n\"]*|kept:[0-9a-f]+"  # file://… is a URL
_REFERENCE = re.compile(REFERENCE)
_KEPT = re.compile(r"kept:([0-9a-f]+)")


def is_reference(value: Any) -> bool:
    return isinstance(value, str) and _REFERENCE.fullmatch(value) is not None


def reveal(setting: str, value: Any) -> Any:
    """Return a setting's value with the secrets that it refers to, also inside lists and mappings. Raises UserError."""
    if isinstance(value, dict):
        return {key: reveal(f"{setting}.{key}", each) for key, each in value.items()}
    if isinstance(value, list):
        return [reveal(setting, each) for each in value]
    return _read(setting, value) if is_reference(value) else value


def _read(setting: str, reference: str) -> str:
    if reference.startswith("$"):
        secret = os.environ.get(reference[1:])
        if not secret:
            raise UserError(f"setting {setting} = {reference}: this environment variable is not set.")
        return secret
    kept = _KEPT.fullmatch(reference)
    path = user_state("secrets", kept[1]) if kept else Path(reference.removeprefix("file:")).expanduser()
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        hint = f"it was kept on another machine or by another user; give it again, --set {setting}=$NAME or file:PATH"
        raise UserError(f"setting {setting} = {reference}: {path} cannot be read; {hint}.") from error
    if not secret:
        raise UserError(f"setting {setting} = {reference}: {path} is empty.")
    return secret


def without_plain_secrets(setting: str, value: Any, saved: Any = None) -> Any:
    """Return a setting's value with every plain secret moved to the state folder.

    saved  the value in corpus.yaml: a secret that is kept there already keeps its reference
    """
    if isinstance(value, dict):
        saved = saved if isinstance(saved, dict) else {}
        return {key: without_plain_secrets(key, each, saved.get(key)) for key, each in value.items()}
    if isinstance(value, list):
        saved = saved if isinstance(saved, list) and len(saved) == len(value) else [None] * len(value)
        return [without_plain_secrets(setting, *pair) for pair in zip(value, saved, strict=True)]
    if not isinstance(value, str) or not value or is_reference(value) or not _is_secret(setting, value):
        return value
    if is_reference(saved) and _KEPT.fullmatch(saved):
        path = user_state("secrets", saved.removeprefix("kept:"))
        if path.is_file() and path.read_text() == value:
            return saved
    name = uuid.uuid4().hex
    write_private(user_state("secrets", name), value.encode())
    return f"kept:{name}"


def _is_secret(name: str, value: str) -> bool:
    """Judge by the option's name, or by a name or a URL inside of the value: "Cookie: x", "youtube:po_token=x"."""
    inside = re.findall(r"([\w-]+)\s*[:=]", value)
    return is_secret_name(name, value) or bool(credentials_in_url(value)) or any(map(is_secret_name, inside))


def for_fingerprint(setting: str, value: Any) -> Any:
    """Return what of a setting's value counts for its stage's fingerprint.

    A reference does not count: another password gives the same video. A secret that was moved counts as it did when it
    stood in corpus.yaml, so that moving it makes no work pending.
    """
    if isinstance(value, dict):
        counted = {key: for_fingerprint(f"{setting}.{key}", each) for key, each in value.items()}
        return {key: each for key, each in counted.items() if each is not None or value[key] is None}
    if isinstance(value, list):
        counted = [for_fingerprint(setting, each) for each in value]
        return [each for each, before in zip(counted, value, strict=True) if each is not None or before is None]
    if is_reference(value):
        return _read(setting, value) if _KEPT.fullmatch(value) else None
    return value


def secret_values(value: Any, before: Any) -> list[str]:
    """Return the texts of a revealed value that were references in `before`, and all credentials of URLs among them."""
    if isinstance(value, dict):
        return [secret for key, each in value.items() for secret in secret_values(each, before[key])]
    if isinstance(value, list):
        return [secret for pair in zip(value, before, strict=True) for secret in secret_values(*pair)]
    if not isinstance(value, str):
        return []
    return [*([value] if is_reference(before) else []), *credentials_in_url(value)]
