"""Options that several commands have, and how their values are read and checked."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.core.errors import UserError
from norm_matters.core.numbers import is_whole

if TYPE_CHECKING:
    from norm_matters.core.config import RunConfig

# Numbers are taken as text, so that a wrong one is told together with all other mistakes.
Number = Annotated[str | None, typer.Option(metavar="N")]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="where datasets lie")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
AnyDevice = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def setting(option: str, text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, one value."""
    from norm_matters.core.yaml import read_yaml

    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise UserError(f"{option}: value '{text}' is not valid; it takes KEY=VALUE")
    return key, read_yaml(value, f"{option} {text}")


def number(option: str, text: str, least: int = 1) -> int:
    """The whole number that an option was given as text.

    Raises:
        UserError: it is none, below `least`, or of 16 digits or more.
    """
    if not is_whole(text, least):
        raise UserError(f"{option}: value '{text}' is not valid; it takes a whole number from {least}")
    return int(text)


def parsed(text: str) -> int | float | str:
    """The number, or the text as it is: the config says what is wrong with it."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def checked(given: dict[str, str | None]) -> "RunConfig":
    """A configuration with these settings (dotted key -> text or None), checked like those of a run."""
    from norm_matters.core.config import load_config
    from norm_matters.run import CHECKS

    options = {key: parsed(text) for key, text in given.items() if text is not None}
    return load_config(options=options, checks={"device": CHECKS["device"]})
