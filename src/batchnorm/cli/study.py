"""``batchnorm study``: one command a study, all of them, and what there is."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batchnorm.cli.lists import option
from batchnorm.cli.toml import read_toml
from batchnorm.records import ENDED, RecordError, Run
from batchnorm.report.replication import Replication, render_replications
from batchnorm.report.shell import write_page
from batchnorm.report.words import plural
from batchnorm.studies.library import load, names
from batchnorm.studies.run_study import Plan, estimate, plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError, StudySettings
from batchnorm.studies.study import Study
from batchnorm.studies.unknown import unknown

__all__ = ["check_name", "replication", "show_verdicts", "study_app", "write_replications"]

REPORT = "report.html"
ALL = "all"

Scale = Literal["quick", "full"]
Flag = Annotated[bool, Parameter(negative="")]


def check_name(arguments: Sequence[str]) -> None:
    """See that the first word after ``study`` names one.

    Raises:
        SettingsError: it does not; the message names what comes near.
    """
    words = [word for word in arguments[:1] if not word.startswith("-")]
    if words and words[0] not in (*names(), ALL):
        raise SettingsError(unknown("study", words[0], [*names(), ALL]))


def study_app() -> App:
    """The command with a command of its own for every study."""
    app = App(name="study", help="Run an experiment of the papers and judge its claims.")
    app.default(_overview)
    for name in names():
        app.command(_command_of(load(name)), name=name)
    app.command(_all, name=ALL)
    return app


def _command_of(study: Study) -> Callable[..., int]:
    """The command of one study: its own settings beside the options that all have."""
    unset = study.settings()

    def command(
        *,
        settings: Any = unset,
        scale: Scale = "quick",
        out: Path | None = None,
        jobs: Annotated[int | None, Parameter()] = None,
        cluster: str | None = None,
        config: Path | None = None,
        status: Flag = False,
        dry_run: Flag = False,
        json: Flag = False,
        quiet: Flag = False,
    ) -> int:
        given = settings.model_dump(exclude_unset=True)
        values = (read_toml(config) if config else {}) | given
        folder = out or _default_root(scale) / study.name
        plan = _plan(study, scale, values, folder)
        if status:
            return _status([plan], json=json)
        if dry_run:
            return _dry_run([plan], _workers(jobs))
        return _run([plan], folder, plan.command, jobs, cluster, json=json, quiet=quiet)

    # Assigned, since an annotation in the source could not name the settings of this study.
    command.__annotations__["settings"] = Annotated[
        study.settings, Parameter(name="*", show_default=False)
    ]
    command.__doc__ = f"{study.question} {study.source}.\n{_OPTIONS}"
    return command


_OPTIONS = """
    Parameters
    ----------
    scale
        quick: within a minute on two cores; full: the settings of the paper.
    out
        Folder for records and report; by default runs/studies/SCALE/NAME.
    jobs
        Cells computed at the same time; by default one a core.
    cluster
        Address of a Dask scheduler (tcp://host:8786), or slurm; by default this machine.
    config
        TOML file with any of these settings; the command line overrules it.
    status
        Say how far the cells of the folder are, and do nothing.
    dry_run
        List the cells, which of them are done, and an estimate of the time; do nothing.
    json
        Print one JSON document instead of text.
    quiet
        Print nothing but errors (and the JSON document, if asked for).
    """


def _all(
    *,
    scale: Scale = "quick",
    seeds: int | None = None,
    out: Path | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    config: Path | None = None,
    status: Flag = False,
    dry_run: Flag = False,
    json: Flag = False,
    quiet: Flag = False,
) -> int:
    """Run every study and write one report with every verdict.

    Parameters
    ----------
    scale
        quick: within a minute a study on two cores; full: the settings of the papers.
    seeds
        Number of seeds of every study; by default its own.
    out
        Folder with a folder for each study; by default runs/studies/SCALE.
    jobs
        Cells computed at the same time; by default one a core.
    cluster
        Address of a Dask scheduler (tcp://host:8786), or slurm; by default this machine.
    config
        TOML file with a table of settings for each study: [mnist] and so on.
    status
        Say how far the cells of the folder are, and do nothing.
    dry_run
        List the cells, which of them are done, and an estimate of the time; do nothing.
    json
        Print one JSON document instead of text.
    quiet
        Print nothing but errors (and the JSON document, if asked for).
    """
    tables = read_toml(config) if config else {}
    for name, table in tables.items():
        if name not in names():
            raise SettingsError(f"--config {config}: " + unknown("study", name, names()))
        if not isinstance(table, dict):
            raise SettingsError(f"--config {config}: {name} must be a table [{name}] of settings.")
    root = out or _default_root(scale)
    common = {} if seeds is None else {"seeds": seeds}
    plans = [
        _plan(load(name), scale, tables.get(name, {}) | common, root / name) for name in names()
    ]
    if status:
        return _status(plans, json=json)
    if dry_run:
        return _dry_run(plans, _workers(jobs))
    words = ["batchnorm", "study", ALL, "--scale", scale, "--out", str(root)]
    words += [] if seeds is None else ["--seeds", str(seeds)]
    words += [] if config is None else ["--config", str(config)]
    return _run(plans, root, shlex.join(words), jobs, cluster, json=json, quiet=quiet)


def _overview(
    *,
    list: Flag = False,
    status: Flag = False,
    scale: Scale = "quick",
    out: Path | None = None,
    json: Flag = False,
) -> int:
    """Run an experiment of the papers and judge its claims: `batchnorm study NAME`.

    Parameters
    ----------
    list
        List the studies (the default).
    status
        Say how far the cells of every study are.
    scale
        Of the cells that --status speaks of.
    out
        Folder with a folder for each study, as of `batchnorm study all`.
    json
        Print one JSON document instead of text.
    """
    if status:
        root = out or _default_root(scale)
        return _status([_plan(load(n), scale, {}, root / n) for n in names()], json=json)
    studies = [load(name) for name in names()]
    if json:
        keys = ("name", "question", "source", "takes_your_network")
        print(dumps([{key: getattr(study, key) for key in keys} for study in studies], indent=1))
        return 0
    for study in studies:
        own = " Takes --model and --task." if study.takes_your_network else ""
        print(f"{study.name:<12} {study.question} {study.source}.{own}")
    return 0


def _default_root(scale: str) -> Path:
    return Path("runs/studies") / scale


def _workers(jobs: int | None) -> int:
    if jobs is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if jobs < 1:
        raise SettingsError(f"jobs={jobs}: at least one cell has to be computed at a time.")
    return jobs


def _plan(study: Study, scale: str, values: dict[str, Any], out: Path) -> Plan:
    settings: StudySettings = settings_of(study, scale, values)
    words = ["batchnorm", "study", study.name, "--scale", scale]
    for name in values:
        words += option(name, getattr(settings, name))
    command = shlex.join([*words, "--out", str(out)])
    return plan_study(study, settings, out, scale=scale, command=command)


def _status(plans: Sequence[Plan], *, json: bool) -> int:
    counted = {}
    for plan in plans:
        states = [plan.state(job) for job in plan.jobs]
        counted[plan.study.name] = {state: states.count(state) for state in sorted({*states})}
    if json:
        print(dumps(counted, indent=1))
        return 0
    for plan in plans:
        those = counted[plan.study.name]
        over = sum(those.get(state, 0) for state in ENDED)
        rest = ", ".join(f"{n} {state}" for state, n in those.items() if state != "done")
        print(
            f"{plan.study.name:<12} {over} of {plural(len(plan.jobs), 'cell')} done"
            + (f" ({rest})" if rest else "")
        )
    return 0


def _dry_run(plans: Sequence[Plan], workers: int) -> int:
    seconds = 0.0
    for plan in plans:
        plan.check()
        rows = [job.settings.axes() for job in plan.jobs]
        keys = dict.fromkeys(key for row in rows for key in row)
        vary = [key for key in keys if len({str(row.get(key)) for row in rows}) > 1]
        for job, row in zip(plan.jobs, rows, strict=True):
            what = ", ".join(f"{key} {row[key]}" for key in vary if key in row)
            print(f"{plan.study.name:<12} {job.folder.name} {plan.state(job):<12} {what}")
        seconds += estimate(plan, workers)
    cells = sum(len(plan.jobs) for plan in plans)
    missing = sum(len(plan.missing()) for plan in plans)
    print(
        f"{plural(missing, 'cell')} of {cells} to compute, about {_duration(seconds)} "
        f"with {plural(workers, 'job')} on this machine."
    )
    return 0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _run(
    plans: Sequence[Plan],
    out: Path,
    command: str,
    jobs: int | None,
    cluster: str | None,
    *,
    json: bool,
    quiet: bool,
) -> int:
    from batchnorm.cli.progress import TerminalListener

    workers = _workers(jobs)
    with TerminalListener(quiet=quiet) as listener:
        runs, interrupted = run_studies(
            plans, out, workers=workers, cluster=cluster, listener=listener
        )
    parts = [replication(run, plan.study) for plan, run in zip(plans, runs, strict=True)]
    write_replications(parts, out / REPORT, command=command)
    show_verdicts(parts, out / REPORT, json=json, quiet=quiet)
    if interrupted:
        print("batchnorm: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def replication(run: Run, study: Study) -> Replication:
    """A run of a study, judged and drawn."""
    return Replication(
        name=study.name,
        question=study.question,
        source=study.source,
        run=run,
        verdicts=study.verdicts(run),
        charts=study.figures(run) if run.cells else [],
        lines=study.lines,
    )


def write_replications(parts: Sequence[Replication], path: Path, *, command: str) -> None:
    """Write the page of one or several studies.

    Raises:
        RecordError: the folder cannot be written.
    """
    try:
        write_page(render_replications(parts, command=command), path)
    except OSError as error:
        raise RecordError(f"{error.filename or path}: {error.strerror}.") from error


def show_verdicts(parts: Sequence[Replication], report: Path, *, json: bool, quiet: bool) -> None:
    """Print the verdict table of each study, or all of them as one JSON document."""
    if json:
        documents = [
            {
                "study": part.name,
                "scale": part.run.study["scale"],
                "settings": part.run.study["settings"],
                "verdicts": [verdict.document() for verdict in part.verdicts],
            }
            for part in parts
        ]
        print(dumps(documents[0] if len(parts) == 1 else documents, indent=1, allow_nan=False))
        return
    if quiet:
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for part in parts:
        table = Table("claim", "the paper reports", "measured", "verdict", title=part.name)
        for verdict in part.verdicts:
            note = f"\n{verdict.note}" if verdict.note else ""
            sentence = f"{verdict.sentence} ({verdict.source}){note}"
            row = (sentence, verdict.reported, verdict.measured, verdict.verdict)
            table.add_row(*map(escape, row))  # brackets are brackets, not markup
        console.print(table)
    print(f"\nReport: {report}")
