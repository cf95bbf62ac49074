"""Weights in files: read without running code, loaded whole or not at all, written atomically."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.extras import require

__all__ = ["READABLE", "WeightsError", "load", "read", "write", "write_program", "write_state"]

READABLE = (".safetensors", ".pt", ".pth")
"""Endings of the names of files that :func:`read` takes."""

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class WeightsError(ValueError):
    """A weight file cannot be used; the message names it, what is wrong and the way out."""


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file, or a ``.pt`` or ``.pth`` of tensors.

    No code of the file is run: what would have to be run to read it is refused.

    Args:
        path: The file.
        key: Where in the file the state dict is, as in ``{"model": ..., "optimizer": ...}``.
            Default: the file is one, or holds exactly one.

    Raises:
        WeightsError: The file cannot be read, would execute code, or holds no state dict.
        MissingExtraError: ``safetensors`` is not installed.
    """
    if path.suffix not in READABLE:
        raise WeightsError(f"{path} is none of {', '.join(READABLE)}, by its name")
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        safetensors = require(
            "safetensors.torch", extra="safetensors", purpose="reading a .safetensors file"
        )
        try:
            content: Any = safetensors.load_file(path)
        except Exception as error:
            raise WeightsError(f"{path} is not readable safetensors: {error}") from error
    else:
        content = _unpickle(path)
    return _state_dict(path, content, key)


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # what matters of them is said below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "TorchScript" in str(error):
            code = "it is a TorchScript program"
        elif found := _GLOBAL.search(str(error)):
            code = f"it refers to {found[1]}"
        elif "Weights only load failed" in str(error):
            code = "it is a pickle that holds more than torch.save puts beside tensors"
        else:
            detail = str(error).partition(". ")[0].partition("\n")[0]
            raise WeightsError(
                f"{path} is damaged, or not what torch.save writes "
                f"({type(error).__name__}: {detail})"
            ) from error
        raise WeightsError(
            f"{path} would execute code to be read: {code}. Refused. Where you trust it, load it "
            "there and save only the weights: torch.save(model.state_dict(), path)"
        ) from error


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(
        isinstance(v, Tensor) for v in value.values()
    )  # fmt: skip


def _state_dict(path: Path, content: Any, key: str | None) -> dict[str, Tensor]:
    held = content if isinstance(content, Mapping) else {}
    inside = [str(k) for k, v in held.items() if _is_state_dict(v)]
    if key is not None:
        if key not in inside:
            there = f"it holds {', '.join(inside)}" if inside else "it holds none below its top"
            raise WeightsError(f"{path} has no state dict under {key!r}; {there}")
        return dict(held[key])
    if _is_state_dict(content):
        return dict(content)
    if len(inside) == 1:
        return dict(held[inside[0]])
    if inside:
        raise WeightsError(f"{path} holds {len(inside)} state dicts: name one, {', '.join(inside)}")
    what = ", ".join(map(str, list(held)[:5])) or f"a {type(content).__name__}"
    raise WeightsError(f"{path} holds no state dict but {what}; save model.state_dict()")


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that fits, or change nothing.

    Names may all begin as ``DistributedDataParallel`` and ``torch.compile`` make them. Missing
    counts of batches stay as they are, as old files have none.

    Raises:
        WeightsError: A name is missing or unknown, or a shape is another.
    """
    target = model.state_dict()
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not target.keys() & state.keys():
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    missing = [n for n in target if n not in state and not n.endswith("num_batches_tracked")]
    unknown = [n for n in state if n not in target]
    shapes = [
        f"{n} ({tuple(state[n].shape)} there, {tuple(v.shape)} here)"
        for n, v in target.items()
        if isinstance(v, Tensor) and n in state and state[n].shape != v.shape
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}"
        for what, found in (
            ("missing", missing), ("not of the network", unknown), ("of another shape", shapes),
        )
        if found
    ]  # fmt: skip
    if problems:
        raise WeightsError(
            f"the weights are not those of {type(model).__name__}: {'; '.join(problems)}. Build "
            "the network as it was when they were saved"
        )
    model.load_state_dict(state, strict=False)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Have ``save`` write a file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        save(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_state(path: Path, model: nn.Module) -> None:
    """Write the state dict of a network as safetensors.

    Raises:
        MissingExtraError: ``safetensors`` is not installed.
    """
    safetensors = require(
        "safetensors.torch", extra="safetensors", purpose="writing a .safetensors file"
    )
    # Cloned: the format has no tensors that share memory, as tied weights do.
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    content = safetensors.save(state, {"format": "pt"})
    write(path, lambda file: file.write_bytes(content))


def write_program(path: Path, model: nn.Module, example: Tensor) -> None:
    """Write a network in its mode as an exported program, for any size of batch if it can be.

    Raises:
        WeightsError: ``torch.export`` cannot capture the network.
    """
    try:
        with torch.no_grad():  # a program for inference
            program = torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},)
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise WeightsError(
            f"torch.export cannot capture {type(model).__name__} ({type(error).__name__}: "
            f"{reason[0]}). Write its weights instead: a name that ends in .safetensors"
        ) from error
    write(path, lambda file: torch.export.save(program, file))
