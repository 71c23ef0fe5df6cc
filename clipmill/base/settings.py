"""Common parts of all settings models. Each stage owns its settings class; `pipeline.engine.settings` joins them.

Modules that define settings import nothing heavy at the top (no av, torch, ray), so that `clipmill --help` is quick.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipmill.base.errors import UserError
from clipmill.base.secrets import for_fingerprint, reveal, secret_values, without_plain_secrets


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are immutable, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def fingerprint(self) -> str:
        """Return a hash of all settings that can change the stage's output, without operational ones and secrets.

        A setting of a later version is left out, too, while it has its default: finished work stays done.
        """
        defaults = type(self)()
        unchanged = {name for name in self._marked("added_later") if getattr(self, name) == getattr(defaults, name)}
        counted = self.model_dump(mode="json", exclude=self._operational() | unchanged)
        return digest({name: for_fingerprint(name, value) if name in self._marked("secret") else value
                       for name, value in counted.items()})  # fmt: skip

    @classmethod
    def _operational(cls) -> set[str]:
        return cls._marked("operational")

    @classmethod
    def _marked(cls, mark: str) -> set[str]:
        extras = ((name, field.json_schema_extra) for name, field in cls.model_fields.items())
        return {name for name, extra in extras if isinstance(extra, dict) and extra.get(mark)}

    def reaching_out(self, prefix: str = "") -> Iterator["ReachingSetting"]:
        """Yield every setting whose value makes a build reach outside the corpus; see `reaches`."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Settings):
                yield from value.reaching_out(f"{prefix}{name}.")
                continue
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if "reaches" in extra and value != field.get_default(call_default_factory=True):
                text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
                if not (extra["unless"] and re.fullmatch(extra["unless"], text)):
                    yield ReachingSetting(prefix + name, value, extra["reaches"])

    def revealed(self, prefix: str = "") -> Self:
        """Return a copy with the secrets that settings refer to, for work and never to be saved. Raises UserError."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        found = {name: each.revealed(f"{prefix}{name}.") for name, each in values.items() if isinstance(each, Settings)}
        found |= {name: reveal(prefix + name, values[name]) for name in self._marked("secret")}
        return self.model_copy(update=found)

    def known_secrets(self, before: Self) -> list[str]:
        """Return the secrets in these revealed settings. `before`: the settings from which they were revealed."""
        texts = [secret_values(getattr(self, name), getattr(before, name)) for name in self._marked("secret")]
        return [secret for found in texts for secret in found]

    def without_plain_secrets(self, saved: dict[str, Any] | None = None, prefix: str = "") -> Self:
        """Return a copy in which every plain secret has been moved to the user's state folder.

        saved  plain data of the settings in corpus.yaml, whose references to the same secrets stay
        """
        saved, changed = saved if isinstance(saved, dict) else {}, {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Settings):
                changed[name] = value.without_plain_secrets(saved.get(name), f"{prefix}{name}.")
            elif name in self._marked("secret"):
                changed[name] = without_plain_secrets(name, value, saved.get(name))
        return self.model_copy(update=changed)


@dataclass(frozen=True)
class ReachingSetting:
    """A setting by which a corpus reaches outside itself: its dotted name, its value and what it does."""

    name: str
    value: Any
    reaches: str


def operational(default: Any, **kwargs: Any) -> Any:
    """Define a setting that changes how fast or safely work is done, not its result: it is not in the fingerprint.

    `kwargs`: of pydantic's `Field`, and of `setting`.
    """
    return setting(default, operational=True, **kwargs)


def setting(
    default: Any,
    *,
    operational: bool = False,
    added_later: bool = False,
    reaches: str | None = None,
    unless: str | None = None,
    secret: bool = False,
    **kwargs: Any,
) -> Any:
    """Define a setting with marks; without any of them, pydantic's `Field` or a plain default is enough.

    Args:
        operational: it is not in the fingerprint.
        added_later: its default is not in the fingerprint.
        reaches: what a value other than the default may do, such as "runs a program". A corpus from somebody else may
            not decide it: see `pipeline.engine.trust`.
        unless: pattern of further values that reach nothing; of a list or mapping, of its JSON with sorted keys.
        secret: it may refer to secrets, see `clipmill.base.secrets`; plain ones are moved out of corpus.yaml.
    """
    marks = {"operational": operational, "added_later": added_later, "secret": secret}
    extra: dict[str, Any] = {name: True for name, is_set in marks.items() if is_set}
    if reaches:
        extra |= {"reaches": reaches, "unless": unless}
    return Field(default, json_schema_extra=extra, **kwargs)


def added_later(default: Any, **kwargs: Any) -> Any:
    """Define a setting that earlier versions lack: its default is not in the fingerprint. `kwargs`: of `setting`."""
    return setting(default, added_later=True, **kwargs)


def digest(value: Any) -> str:
    """Return a stable hash of any JSON value, 16 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# -- from recipes and `--set` ------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=Settings)


def resolve_settings(
    model: type[Model], recipes: Traversable, base: dict[str, Any] | None, recipe: str | None, assignments: list[str]
) -> Model:
    """Make settings from a recipe (else `base`, else the defaults) and `--set section.key=value`. Raises UserError.

    recipe  the name of one of `recipes`' YAML files, or a path
    """
    data = load_recipe(recipes, recipe) if recipe else dict(base or {})
    for assignment in assignments:
        _assign(data, assignment)
    return validate_settings(model, data)


def validate_settings(model: type[Model], data: dict[str, Any]) -> Model:
    """Validate settings. Raises UserError with a line for each wrong setting."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(model, error.errors())) from None


MAX_YAML_VALUES = 100_000


def read_yaml(text: str) -> Any:
    """Read plain values from a YAML text.

    Raises yaml.YAMLError, also for tags that create objects, for aliases that expand without limit, for deep nesting.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _num_values(node, {}) > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"its aliases expand to more than {MAX_YAML_VALUES:,} values")
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or an alias contains itself") from None
    except ValueError as error:  # an invalid date, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _num_values(node: Any, known: dict[int, int]) -> int:
    """Count the values of a node with all aliases expanded."""
    if isinstance(node.value, str):
        return 1
    if id(node) not in known:
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def recipe_names(recipes: Traversable) -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in recipes.iterdir() if path.name.endswith(".yaml"))


def load_recipe(recipes: Traversable, name: str) -> dict[str, Any]:
    """Load a shipped recipe by name, or a YAML file by path. Raises UserError."""
    import yaml

    shipped = recipe_names(recipes)
    source = recipes.joinpath(f"{name}.yaml") if name in shipped else Path(name)
    if not source.is_file():
        raise UserError(f"--recipe {name}: not a file, and not one of {', '.join(shipped)}.")
    try:
        data = read_yaml(source.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {name} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"--recipe {name}: expected sections such as `cut:`, found {type(data).__name__}.")
    return data


def _assign(data: dict[str, Any], assignment: str) -> None:
    import yaml

    path, equals, text = assignment.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not sections:
        raise UserError(f"--set {assignment}: write it as section.key=value, for example --set cut.fps=2.")
    try:
        value = read_yaml(text) if text.strip() else ""  # an empty value is the empty text, not null
    except yaml.YAMLError as error:
        raise UserError(f"--set {assignment}: the value is not YAML ({error}).") from error
    for section in sections:
        branch = data.get(section)
        data[section] = data = dict(branch) if isinstance(branch, dict) else {}
    data[key] = value


def _explain(model: type[Settings], problems: list[Any]) -> str:
    """Return one line per wrong setting, with its name and allowed values."""
    messages: dict[str, list[str]] = {}
    for problem in problems:
        where, section = _locate(model, problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(section.model_fields)
            messages[f"setting {where}"] = [f"there is no such setting; known are {known}"]
        else:
            text = problem["msg"].removeprefix("Value error, ")
            text = text if text != problem["msg"] else text[0].lower() + text[1:]
            named = f"setting {where}" if where else "settings"
            if not isinstance(problem["input"], dict):  # a contradiction within a section: the text names its settings
                value = repr(problem["input"])
                named += f" = {value if len(value) <= 200 else value[:199] + '…'}"
            messages.setdefault(named, []).append(text)
    return "\n".join(f"{where}: {' or '.join(texts)}." for where, texts in messages.items())


def _locate(model: type[Settings], location: tuple[Any, ...]) -> tuple[str, type[Settings]]:
    """Return the dotted name of a setting, without parts that name branches of its type, and its model."""
    names = []
    for part in location:
        names.append(str(part))
        field = model.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            break
        model = field.annotation
    return ".".join(names), model
