"""Load plug-ins: functions and classes that a setting names as `MODULE:ATTRIBUTE`.

Any setting of this form is loaded here, so that all of them report mistakes alike. The module must be importable; no
path is added to Python's.
"""

import importlib
from collections.abc import Callable
from typing import Any

from clipmill.base.errors import UserError


def load_attribute(path: str, setting: str) -> Callable[..., Any]:
    """Import what `path` ("MODULE:ATTRIBUTE") names; `setting` is the dotted name of the setting, for messages.

    Raises UserError where the module cannot be imported, or has no such attribute, or the attribute is not callable.
    """
    module, _, name = path.partition(":")
    wrong = f"setting {setting} = {path}"
    if not module or not name:
        raise UserError(f"{wrong} must have the form MODULE:ATTRIBUTE, such as my_package.my_module:my_function.")
    try:
        attribute = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{wrong}: {error}. Give MODULE:ATTRIBUTE, with the module on PYTHONPATH.") from error
    if not callable(attribute):
        raise UserError(f"{wrong} is not callable but of type {type(attribute).__name__}; name a function or a class.")
    return attribute
