"""Load plug-ins that a setting names as MODULE:ATTRIBUTE: captioners, losses and methods, built in or external."""

import importlib
from typing import Any

from clipmill.base.errors import UserError

PLUGIN = r"^[\w.]+:\w+$"  # MODULE:ATTRIBUTE, the pattern of a setting that may name a plug-in


def load_attribute(setting: str, value: str, place: str | None = None) -> Any:
    """Import the object that `setting` = `value` stands for.

    place  MODULE:ATTRIBUTE of a value that is a short name; None: the value is one itself
    Raises UserError for a module or attribute that does not exist.
    """
    module, _, attribute = (place or value).partition(":")
    if not module or not attribute:
        raise UserError(f"setting {setting} = {value}: it must have the form MODULE:ATTRIBUTE.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"setting {setting} = {value}: {error}; the module must be on PYTHONPATH.") from error
    except AttributeError as error:
        raise UserError(f"setting {setting} = {value}: {error}; name one as MODULE:ATTRIBUTE.") from error
