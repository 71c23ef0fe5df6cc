"""The folder of this user on this machine, outside any corpus: $XDG_STATE_HOME/clipmill, else ~/.local/state/clipmill.

It holds what must not travel with a corpus: secrets, full URLs of lists, and the key that marks settings as the user's
own. Only this user can read it.
"""

import os
from pathlib import Path

from clipmill.base.errors import UserError


def user_state(*parts: str) -> Path:
    """Return a path in the folder, whose parents exist. Raises UserError if it cannot be made."""
    base = os.environ.get("XDG_STATE_HOME")
    folder = (Path(base) if base else Path.home() / ".local" / "state") / "clipmill"
    path = folder.joinpath(*parts)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); it holds secrets and this user's key: set XDG_STATE_HOME "
            "to a folder that can."
        ) from error
    return path


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read, if it does not exist; an existing one stays."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): set XDG_STATE_HOME to another folder."
        ) from error
    with open(descriptor, "wb") as file:
        file.write(data)
