"""The commands that change a network: load, call a verb, print, write. Each returns its exit code.

They work on CPU. Results go to standard output, progress to standard error on a terminal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from batchnorm.studies.settings import Scaling, SettingsError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CommandError", "convert", "fold", "recalibrate"]

_STATE, _PROGRAM = ".safetensors", ".pt2"

Flag = Annotated[bool, Parameter(negative="")]


class CommandError(Exception):
    """A command could not do its work; nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the commands have in common."""

    weights: Path | None = None
    """File of weights, .safetensors, .pt or .pth; the network as the callable makes it if none."""

    key: str | None = None
    """Where in the file the state dict is, if it holds several."""

    out: Path | None = None
    """File to write: .safetensors (state dict) or .pt2 (exported program). Nothing if not given."""

    overwrite: Flag = False
    """Replace a file that is there."""

    json: Flag = False
    """Print one JSON document instead of text."""

    quiet: Flag = False
    """Print nothing but errors (and the JSON document, if asked for)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the network is run on to see what it does."""

    task: str | None = None
    """Data to take the example from, as for compare."""

    scaling: Scaling = "unit"
    """Scaling of the data, as in training."""

    shape: tuple[int, ...] | None = None
    """Shape of one input, such as 3,224,224, for an example of Gaussian noise."""

    batch_size: int = 8
    """Number of inputs in the example."""


_OPTIONS, _EXAMPLE = Options(), Example()


def _network(name: str, options: Options) -> nn.Module:
    """Make the network, with its weights, in evaluation mode."""
    from batchnorm.studies.callables import is_callable_name
    from batchnorm.studies.models import called
    from batchnorm.weights import WeightsError, load, read

    if not is_callable_name(name):
        raise SettingsError(
            f"model={name!r} is not of the form module:callable, a function without arguments "
            "that returns the network."
        )
    _check_out(options)
    model = called(name)
    if options.weights is not None:
        try:
            load(model, read(options.weights, options.key))
        except WeightsError as error:
            raise SettingsError(f"--weights: {error}.") from error
    return model.eval()


def _check_out(options: Options) -> None:
    """Refuse before any work what could not be written after it."""
    out = options.out
    if out is None:
        return
    if out.suffix not in (_STATE, _PROGRAM):
        raise SettingsError(
            f"--out {out} must end in {_STATE} (state dict) or {_PROGRAM} (exported program)."
        )
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise SettingsError(f"--out {out}: {out.parent} is not a folder that can be written to.")
    if out.exists() and not options.overwrite:
        raise SettingsError(f"--out {out} is there already; pass --overwrite to replace it.")
    if out.suffix == _STATE:
        from batchnorm.extras import require

        require("safetensors", extra="safetensors", purpose=f"writing {out}")


def _inputs(example: Example) -> Tensor:
    import torch

    from batchnorm.studies.tasks import load_task

    if (example.task is None) == (example.shape is None):
        raise SettingsError(
            "the network has to be run on an example: give either --task (data, as for compare) "
            "or --shape (of one input, such as 3,224,224)."
        )
    if example.batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1, not {example.batch_size}.")
    if example.task is not None:
        return load_task(example.task, example.scaling).train.x[: example.batch_size]
    assert example.shape is not None
    if min(example.shape, default=1) < 1:
        raise SettingsError(f"--shape must be numbers above 0, not {example.shape}.")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(example.batch_size, *example.shape, generator=generator)


def _run(model: nn.Module, inputs: Tensor, name: str) -> list[Tensor]:
    import torch
    from torch.utils._pytree import tree_leaves

    try:
        with torch.no_grad():
            output = model(inputs)
    except Exception as error:
        raise SettingsError(
            f"model={name!r} fails on an input of shape {tuple(inputs.shape)} "
            f"({type(error).__name__}: {error}). Choose another --task or --shape."
        ) from error
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _refusals() -> Iterator[None]:
    """What a verb refuses is an error to print, not a traceback."""
    from batchnorm.weights import WeightsError

    try:
        yield
    except (SettingsError, WeightsError):
        raise
    except (ValueError, TypeError) as error:
        raise CommandError(f"{error}. Nothing was written.") from error


def _finish(
    model: nn.Module,
    inputs: Tensor,
    options: Options,
    document: dict[str, Any],
    lines: list[str],
) -> int:
    """Write what was asked for, then say what was done."""
    from batchnorm.weights import WeightsError, write_program, write_state

    out = options.out
    if out is not None:
        try:
            if out.suffix == _PROGRAM:
                write_program(out, model, inputs)
            else:
                write_state(out, model)
        except WeightsError as error:
            raise CommandError(f"--out {out}: {error}.") from error
        except OSError as error:
            raise CommandError(f"--out {out}: {error.strerror or error}.") from error
        what = "exported program" if out.suffix == _PROGRAM else "state dict"
        lines.append(f"Written: {out} ({what})")
    document["out"] = None if out is None else str(out)
    if options.json:
        print(dumps(document, indent=1))
    elif not options.quiet:
        print("\n".join(lines))
    return 0


def _table(rows: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Rows by name, in columns."""
    cells = [(name or "(the network)", *row) for name, row in rows.items()]
    columns = max(map(len, cells))
    widths = [max((len(row[i]) for row in cells if i < len(row) - 1), default=0)
              for i in range(columns)]  # fmt: skip
    return ["  ".join(f"{cell:<{widths[i]}}" for i, cell in enumerate(row)).rstrip()
            for row in cells]  # fmt: skip


def fold(
    model: str,
    /,
    *,
    example: Annotated[Example, Parameter(name="*")] = _EXAMPLE,
    options: Annotated[Options, Parameter(name="*")] = _OPTIONS,
) -> int:
    """Merge batch norms into the linear operations beside them, for inference.

    A state dict that is written fits the network only after fold() there, too; an exported
    program needs nothing but torch.

    Parameters
    ----------
    model
        module:callable that makes the network.

    Example:
        What to verify the result on.
    options
        Weights in, files out.
    """
    from batchnorm.transforms.fold import fold as merge

    network = _network(model, options)
    inputs = _inputs(example)
    _run(network, inputs, model)
    with _refusals():
        report = merge(network, inputs)
    layers: dict[str, dict[str, Any]] = {
        name: {"into": list(into), "difference": report.differences[name]}
        for name, into in report.folded.items()
    } | {name: {"left": reason} for name, reason in report.left.items()}
    rows = {
        name: (f"into {', '.join(into)}", f"{report.differences[name]:.1e}")
        for name, into in report.folded.items()
    } | {name: (f"left: {reason}",) for name, reason in report.left.items()}
    lines = [
        *_table(rows),
        f"{len(report.folded)} of {len(layers)} batch norms folded; the output changed by at most "
        f"{report.largest_difference:.1e} on {len(inputs)} inputs.",
    ]
    if report.channels_last:
        lines.append("Their two-dimensional convolutions are laid out channels last.")
    document = {
        "command": "fold",
        "model": model,
        "layers": layers,
        "largest_difference": report.largest_difference,
        "channels_last": report.channels_last,
    }
    return _finish(network, inputs, options, document, lines)


def convert(
    model: str,
    /,
    *,
    to: Literal["batchnorm", "torch"] = "batchnorm",
    example: Annotated[Example, Parameter(name="*")] = _EXAMPLE,
    options: Annotated[Options, Parameter(name="*")] = _OPTIONS,
) -> int:
    """Turn torch's batch norms into ours, or back, and check that the output is the same.

    State dicts are the same either way. An exported program of our layers runs where batchnorm
    is imported; one of torch's anywhere.

    Parameters
    ----------
    model
        module:callable that makes the network.
    to
        Whose layers: batchnorm or torch.

    Example:
        What to compare the outputs on.
    options
        Weights in, files out.
    """
    from batchnorm.transforms.calls import largest_difference
    from batchnorm.transforms.convert import convert as to_ours
    from batchnorm.transforms.convert import revert as to_theirs
    from batchnorm.transforms.layers import batch_norms

    network = _network(model, options)
    inputs = _inputs(example)
    before = _run(network, inputs, model)
    with _refusals():
        classes = {name: type(layer) for name, layer in batch_norms(network).items()}
        (to_ours if to == "batchnorm" else to_theirs)(network)
    difference, scale = largest_difference(before, _run(network, inputs, model))
    if not difference <= 1e-4 * scale:
        raise CommandError(
            f"the converted network's output differs by {difference:.1e} (largest value "
            f"{scale:.1e}): it looks at the class of its layers, or is not the same from run to "
            "run. Nothing was written."
        )
    layers, rows = {}, {}
    for name, layer in batch_norms(network).items():
        old, new = classes[name], type(layer)
        changed = new is not old
        layers[name] = {"class": f"{new.__module__}.{new.__qualname__}", "converted": changed}
        already = new.__module__.partition(".")[0] == to
        kept = f"left: is one of {to}'s" if already else "left: may do more than torch's"
        rows[name] = (new.__name__, "converted" if changed else kept)
    done = sum(layer["converted"] is True for layer in layers.values())
    lines = [
        *_table(rows),
        f"{done} of {len(layers)} batch norms converted to {to}'s; the output changed by at most "
        f"{difference:.1e} on {len(inputs)} inputs.",
    ]
    document = {
        "command": "convert",
        "model": model,
        "to": to,
        "layers": layers,
        "largest_difference": difference,
    }
    return _finish(network, inputs, options, document, lines)


def recalibrate(
    model: str,
    /,
    *,
    task: str,
    scaling: Scaling = "unit",
    batch_size: int = 64,
    limit: int | None = None,
    method: Literal["pooled", "mean"] = "pooled",
    options: Annotated[Options, Parameter(name="*")] = _OPTIONS,
) -> int:
    """Replace running statistics by those of the training set, with the weights as they are.

    Parameters
    ----------
    model
        module:callable that makes the network.
    task
        Data, as for compare: their training set is used.
    scaling
        Scaling of the data, as in training.
    batch_size
        Examples in a batch; as in training, as layers see inputs normalised by the batch.
    limit
        Use so many examples (a fixed random choice); a few thousand do.
    method
        pooled: of all values together; mean: Algorithm 2 of the first paper.
    options
        Weights in, files out.
    """
    import torch

    from batchnorm.cli.progress import Bar
    from batchnorm.studies.tasks import load_task
    from batchnorm.transforms.layers import batch_norms
    from batchnorm.transforms.recalibrate import recalibrate as measure

    if batch_size < 2:
        raise SettingsError(
            f"--batch-size must be at least 2, not {batch_size}: one has no variance."
        )
    if limit is not None and limit < 2:
        raise SettingsError(f"--limit must be at least 2, not {limit}: one has no variance.")
    network = _network(model, options)
    x = load_task(task, scaling, limit).train.x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(-(-len(x) // batch_size))  # of nearly one size, none of one example
    _run(network, x[parts[0]], model)
    with _refusals(), Bar("recalibrate", "batches", quiet=options.quiet) as bar:
        layers = batch_norms(network)
        before = {
            name: _moments(layer)
            for name, layer in layers.items()
            if layer.running_mean is not None
        }
        report = measure(network, _Batches(x, parts), method=method, progress=bar)
    found: dict[str, dict[str, Any]] = {}
    rows: dict[str, tuple[str, ...]] = {}
    for name, values in report.values.items():
        mean, var = (
            new - old for new, old in zip(_moments(layers[name]), before[name], strict=True)
        )
        old_var = before[name][1]
        moved = float((mean.abs() / (old_var + layers[name].eps).sqrt()).max())
        ratio = (var + old_var + layers[name].eps) / (old_var + layers[name].eps)
        low, high = float(ratio.min()), float(ratio.max())
        found[name] = {"values": values, "mean_moved": moved, "variance_ratio": [low, high]}
        rows[name] = (
            f"{values} values",
            f"mean moved by up to {moved:.3g}σ",
            f"variance ×{low:.3g} to ×{high:.3g}",
        )
    found |= {name: {"left": reason} for name, reason in report.left.items()}
    rows |= {name: (f"left: {reason}",) for name, reason in report.left.items()}
    lines = [
        *_table(rows),
        f"{len(report.values)} of {len(rows)} batch norms recalibrated on {len(x)} examples in "
        f"{report.batches} batches.",
    ]
    document = {
        "command": "recalibrate",
        "model": model,
        "method": method,
        "examples": len(x),
        "batches": report.batches,
        "layers": found,
    }
    return _finish(network, x[parts[0]], options, document, lines)


class _Batches:
    """Batches of rows, made when asked for."""

    def __init__(self, x: Tensor, parts: tuple[Tensor, ...]) -> None:
        self._x, self._parts = x, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._x[part] for part in self._parts)


def _moments(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.running_mean.double().clone(), layer.running_var.double().clone()
