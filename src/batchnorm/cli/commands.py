"""The commands. Each returns its exit code."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators
from pydantic import ValidationError

from batchnorm import __version__
from batchnorm.cli.lists import option
from batchnorm.cli.toml import read_toml
from batchnorm.records import RecordError, Run
from batchnorm.studies.settings import CompareSettings, SettingsError, problems

__all__ = ["compare", "info", "report"]

REPORT = "report.html"

_DEFAULTS = CompareSettings()


def _settings(given: CompareSettings, config: Path | None) -> CompareSettings:
    """Settings of the file, overruled by those of the command line."""
    if config is None:
        return given
    values = read_toml(config)
    try:
        return CompareSettings(**{**values, **given.model_dump(exclude_unset=True)})
    except ValidationError as error:
        raise SettingsError(f"--config {config}: {problems(error)}") from error


def _command(settings: CompareSettings, out: Path) -> str:
    """What to type to run this again, whatever the defaults and settings files of then."""
    words = ["batchnorm", "compare"]
    for name, value in settings.model_dump(exclude_none=True).items():
        words += option(name, value)
    return shlex.join([*words, "--out", str(out)])


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        print(text)


def compare(
    *,
    settings: Annotated[CompareSettings, Parameter(name="*")] = _DEFAULTS,
    out: Path = Path("runs/compare"),
    config: Path | None = None,
    jobs: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 1,
    export: Literal["parquet"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train the same network with and without batch norm, measure everything, write a report.

    Run it again with the same --out to go on where it stopped or to add seeds, rates or arms.

    Parameters
    ----------
    settings
        What to compare.
    out
        Folder for records and report.
    config
        TOML file with any of these settings; the command line overrules it.
    jobs
        Networks trained at the same time, each in a process of its own.
    export
        Also write all records as one Parquet file.
    json
        Print the summary as one JSON document instead of text.
    quiet
        Print nothing but errors (and the JSON document, if asked for).
    """
    settings = _settings(settings, config)
    from batchnorm.cli.progress import TerminalListener
    from batchnorm.studies.compare import compare as run_compare

    with TerminalListener(quiet=quiet) as listener:
        run, interrupted = run_compare(
            settings, out, command=_command(settings, out), jobs=jobs, listener=listener
        )
    _write(run, out / REPORT, export=export, as_json=json, quiet=quiet)
    if interrupted:
        print("batchnorm: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def report(
    folder: Path,
    /,
    *,
    png: Path | None = None,
    export: Literal["parquet"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write the report of a run again, from its records.

    Parameters
    ----------
    folder
        Folder that `batchnorm compare` or `batchnorm study` wrote.
    png
        Also draw every chart as a PNG file into this folder.
    export
        Also write all records as one Parquet file.
    json
        Print the summary as one JSON document instead of text.
    quiet
        Print nothing but errors (and the JSON document, if asked for).
    """
    run = Run.read(folder)
    if run.study["study"] != "compare":
        return _report_study(run, png, export, as_json=json, quiet=quiet)
    _write(run, folder / REPORT, export=export, as_json=json, quiet=quiet)
    if png is not None:
        from batchnorm.report import write_png

        files = write_png(run, png)
        _say(f"{len(files)} charts in {png}", quiet=quiet or json)
    return 0


def _report_study(
    run: Run, png: Path | None, export: Literal["parquet"] | None, *, as_json: bool, quiet: bool
) -> int:
    from batchnorm.cli.study import replication, show_verdicts, write_replications
    from batchnorm.report.png import write_charts
    from batchnorm.studies.library import load

    part = replication(run, load(str(run.study["study"])))
    path = run.folder / REPORT
    write_replications([part], path, command=str(run.study["command"]))
    show_verdicts([part], path, json=as_json, quiet=quiet)
    if png is not None:
        files = write_charts(part, png)
        _say(f"{len(files)} charts in {png}", quiet=quiet or as_json)
    _export(run, export, quiet=quiet or as_json)
    return 0


def _export(run: Run, export: Literal["parquet"] | None, *, quiet: bool) -> None:
    if export is not None:
        from batchnorm.export import write_parquet

        _say(f"Records: {write_parquet(run, run.folder)}", quiet=quiet)


def _write(
    run: Run, path: Path, *, export: Literal["parquet"] | None, as_json: bool, quiet: bool
) -> None:
    from batchnorm.report import summarize, write_html

    try:
        write_html(run, path)
    except OSError as error:
        raise RecordError(f"{error.filename or path}: {error.strerror}.") from error
    summary = summarize(run)
    if as_json:
        print(dumps(summary.document(), indent=1))
    else:
        _say("\n".join(summary.sentences), quiet=quiet)
        _say(f"\nReport: {path}", quiet=quiet)
    _export(run, export, quiet=quiet or as_json)


def info(*, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Say which versions, kernels, threads and extras are in use.

    Parameters
    ----------
    json
        Print one JSON document.
    """
    import torch

    from batchnorm.ops import kernels

    extras: dict[str, Any] = {}
    for package in (
        *("scikit-learn", "mlxtend", "datasets", "pyarrow", "matplotlib"),
        *("distributed", "submitit", "safetensors"),
    ):
        try:
            extras[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            extras[package] = None
    document = {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": kernels(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "extras": extras,
    }
    if json:
        print(dumps(document, indent=1))
        return 0
    for name, value in document.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v or '(not installed)'}" for k, v in value.items())
        print(f"{name:<10} {shown}")
    return 0
