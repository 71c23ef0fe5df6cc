"""Make pickles that run code when they are read."""

import os
from pathlib import Path
from typing import Any


class HostilePickle:
    """Make a folder when its pickle is read."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)
