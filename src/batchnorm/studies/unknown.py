"""The message for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["unknown"]


def unknown(setting: str, value: str, known: Iterable[str]) -> str:
    """Say that ``value`` is unknown, what comes near and what there is."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{setting}={value!r} is unknown.{hint} There is: {', '.join(names)}."
