"""Settings files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from batchnorm.studies.settings import SettingsError

__all__ = ["read_toml"]


def read_toml(config: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        SettingsError: it cannot be read, or is not TOML.
    """
    try:
        with config.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"--config {config} cannot be read: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config {config} is not TOML: {error}.") from error
