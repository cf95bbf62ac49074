"""The command line: parse, call, print.

Nothing here imports torch before a command needs it, so that ``batchnorm --help`` is immediate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from batchnorm import __version__
from batchnorm.cli.commands import compare, info, report
from batchnorm.cli.lists import join_commas, split_commas
from batchnorm.cli.transform_commands import CommandError, convert, fold, recalibrate
from batchnorm.extras import MissingExtraError
from batchnorm.records import RecordError
from batchnorm.studies.settings import SettingsError, problems

__all__ = ["DONE", "FAILURE", "INTERRUPTED", "USAGE", "app", "main"]

DONE, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

app = App(
    name="batchnorm",
    help="Batch normalization end to end: train your network with and without it, and measure.",
    version=__version__,
    config=split_commas,
    default_parameter=Parameter(show_default=join_commas, negative_iterable=()),
    result_action="return_value",
)
app.command(compare)
app.command(report)
app.command(convert)
app.command(fold)
app.command(recalibrate)
app.command(info)
# Every study has settings of its own; they are read when one is asked for.
app.command(App(name="study", help="Run an experiment of the papers and judge its claims."))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["study"]:
            from batchnorm.cli.study import check_name, study_app

            check_name(words[1:])
            del app["study"]
            app.command(study_app())
        code = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        cause = error.__cause__
        invalid = problems(cause, "--") if isinstance(cause, ValidationError) else str(error)
        code = _fail(invalid, USAGE)
    except (SettingsError, MissingExtraError) as error:
        code = _fail(str(error), USAGE)
    except (RecordError, CommandError) as error:
        code = _fail(str(error), FAILURE)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print(f"batchnorm: {message}", file=sys.stderr)
    return code
