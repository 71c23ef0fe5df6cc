"""Describe settings from their own source: type, default, limits, and the comment beside each of them."""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clipmill.base.settings import Settings

BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}
TYPES = {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}


@dataclass(frozen=True)
class SettingInfo:
    """One setting, ready to print.

    name         dotted below its section, e.g. "clip4clip.head"
    values       accepted values, in words
    default      as JSON-able data
    comment      one paragraph, empty if the source has none
    operational  True: it changes speed or safety, never the result
    """

    name: str
    values: str
    default: Any
    comment: str
    operational: bool


def describe_settings(model: type[Settings], prefix: str = "") -> Iterator[SettingInfo]:
    """Describe every setting of a model, those of nested models included, in the order of the source."""
    schema = model.model_json_schema()
    defaults = model().model_dump(mode="json")
    comments = {name: comment for base in reversed(model.__mro__) for name, comment in _comments(base).items()}
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Settings):
            yield from describe_settings(field.annotation, f"{prefix}{name}.")
            continue
        yield SettingInfo(
            f"{prefix}{name}",
            _values(schema["properties"][name]),
            defaults[name],
            comments.get(name, ""),
            name in model._operational(),
        )


def _comments(model: type) -> dict[str, str]:
    """Read the comment of each field of a class: the lines right above it, then the one at its end."""
    if not issubclass(model, Settings) or model is Settings:
        return {}
    try:
        source = textwrap.dedent(inspect.getsource(model))
    except OSError:  # a class joined from sections at run time has no source of its own
        return {}
    lines = source.splitlines()
    comment_of_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while first > 1 and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        texts = [comment_of_line[line] for line in range(first, node.end_lineno + 1) if line in comment_of_line]
        found[node.target.id] = " ".join(texts)
    return found


def _values(schema: dict[str, Any]) -> str:
    """Say in words which values a JSON schema accepts."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_values(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        items = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
        return f"a list of {_values(items)}" if items else "a list"
    if schema.get("type") in ("integer", "number"):
        bounds = [f"{word} {schema[key]:g}" for key, word in BOUNDS.items() if key in schema]
        return " ".join([schema["type"], ", ".join(bounds)]).strip()
    return TYPES.get(schema.get("type", ""), "any value")
