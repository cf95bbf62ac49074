"""Settings on the command line: lists as ``--lr 0.1,1,10``, switches as ``--lrn``."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from cyclopts import App, ArgumentCollection

__all__ = ["join_commas", "option", "split_commas"]


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(get_origin(part) is tuple for part in get_args(hint))


def split_commas(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give a tuple-valued argument one token for each value between commas."""
    for argument in arguments:
        if _is_list(argument.hint):
            argument.tokens = [
                token.evolve(value=value.strip(), index=index)
                for token in argument.tokens
                for index, value in enumerate(token.value.split(","))
            ]


def join_commas(value: Any) -> str:
    """The same, the other way round: how a value is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def option(name: str, value: Any) -> list[str]:
    """The words that give a setting this value."""
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    return [f"--{word}", join_commas(value)]
