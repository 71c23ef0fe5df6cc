"""Measure work by counting calls, which gives the same number on any machine under any load."""

import sys
import threading
from collections.abc import Callable
from typing import Any


def count_calls(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """Return a function's result and how many functions it called, Python's and C's, in threads that it started too."""
    calls: list[None] = []  # appending is atomic, so threads lose no count

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(None)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        return function(*arguments), len(calls)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
