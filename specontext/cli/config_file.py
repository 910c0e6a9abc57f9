"""`--config FILE`: options of a command from a YAML file; what stands on the command line wins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specontext.cli.terminal import UsageError


def read_options(file: str, known: set[str]) -> dict[str, Any]:
    """Options by the names of their parameters; a list is an option that is given more than once.

    Raises:
        UsageError: an unreadable file, or something in it that is no option.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the options in {file}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} must hold options, one `name: value` a line")
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"{file} sets {', '.join(unknown)}, which the command does not have")
    for name, value in options.items():
        plain = isinstance(value, str | int | float) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if value is not None and not plain:
            raise UsageError(f"{file}: {name} must be a text, a number, true, false, or a list of texts")
    return {name: value for name, value in options.items() if value is not None}


def _load(context: typer.Context, file: str | None) -> str | None:
    if file is not None:
        known = {parameter.name for parameter in context.command.params if parameter.name} - {"config_file"}
        values = read_options(file, known)
        for parameter in context.command.params:
            if parameter.name in values and parameter.multiple and not isinstance(values[parameter.name], list):
                values[parameter.name] = [values[parameter.name]]
        context.default_map = {**(context.default_map or {}), **values}
    return file


ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", is_eager=True, callback=_load, help="YAML file with options of this command."),
]
