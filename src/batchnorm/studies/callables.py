"""The user's own code, named ``module:callable``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchnorm.studies.settings import SettingsError

__all__ = ["CallableError", "is_callable_name", "load_callable", "source_hash"]

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class CallableError(SettingsError):
    """The user's callable cannot be found, failed, or returned the wrong thing."""


def is_callable_name(name: str) -> bool:
    """Whether ``name`` has the form ``module:callable``."""
    return _NAME.fullmatch(name) is not None


def load_callable(setting: str, name: str) -> Callable[..., Any]:
    """Import ``module:callable``; the working directory is searched too, as by ``python -m``.

    Raises:
        CallableError: the module or the name in it does not exist, or cannot be called.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:
        raise CallableError(
            f"{setting}={name!r}: importing {module_name!r} failed with "
            f"{type(error).__name__}: {error}. It is searched in the working directory and the "
            "installed packages."
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise CallableError(f"{setting}={name!r}: {module_name!r} has no {attribute!r}.")
        target = getattr(target, part)
    if not callable(target):
        raise CallableError(
            f"{setting}={name!r} is a {type(target).__name__}, not something to call."
        )
    result: Callable[..., Any] = target
    return result


def source_hash(setting: str, name: str) -> str:
    """Hash of the source file that defines the callable, so that an edit is noticed."""
    target = inspect.unwrap(load_callable(setting, name))
    try:
        source = Path(inspect.getsourcefile(target) or "").read_bytes()
    except (TypeError, OSError):
        return ""  # built in or made on the fly: there is no file to watch
    return hashlib.sha256(source).hexdigest()[:12]
