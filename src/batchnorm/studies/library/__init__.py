"""The studies: one file each, found by their name. Listing them does not import torch."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from batchnorm.studies.settings import SettingsError
from batchnorm.studies.study import Study
from batchnorm.studies.unknown import unknown

__all__ = ["load", "names"]


def names() -> list[str]:
    """Names of all studies: those of their modules, with hyphens."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Study:
    """The study of that name.

    Raises:
        SettingsError: there is none; the message names what comes near.

    Example:
        >>> load("bias").source
        '[P1] Section 2'
    """
    if name not in names():
        raise SettingsError(unknown("study", name, names()))
    study: Study = import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
    return study
