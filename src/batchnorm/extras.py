"""Optional packages: imported when needed, named when missing."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingExtraError", "require"]


class MissingExtraError(ImportError):
    """An optional package is not installed; the message gives the command that installs it."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import ``module`` or say which extra of this package brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.partition('.')[0]}, which cannot be imported ({error}). "
            f"Install it with: pip install 'batchnorm[{extra}]'"
        ) from error
