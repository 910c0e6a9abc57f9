"""`--config FILE`: options of a command from a YAML file; what stands on the command line wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from specontext.cli.terminal import UsageError


def read_options(file: str) -> dict[str, Any]:
    """What a YAML file says: texts as they would stand on the command line, lists of them, and None for nulls.

    What YAML would make of a text that is not between quotes does not count: a revision `1.10` is not the number 1.1, a key `007`
    not 7, and a method `no` not false.

    Raises:
        UsageError: an unreadable file, or one that holds no options.
    """
    import yaml

    class AsWritten(yaml.SafeLoader):
        """Reads texts where YAML knows numbers, truth values and times."""

    for kind in ("int", "float", "bool", "timestamp"):
        AsWritten.add_constructor(f"tag:yaml.org,2002:{kind}", yaml.SafeLoader.construct_scalar)
    try:
        text = Path(file).read_text(encoding="utf-8")
        found, tree = yaml.load(text, AsWritten), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the options in {file}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{file} is nested too deeply: it must hold options, one `name: value` a line") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} must hold options, one `name: value` a line")
    names = [str(key.value).replace("-", "_") for key, _ in tree.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):  # of which YAML would keep the last
        raise UsageError(f"{file} sets {twice[0]} more than once: an option that takes several texts takes them as a list")
    return found


def as_defaults(found: Mapping[Any, Any], parameters: Iterable[Any], source: str) -> dict[str, Any]:
    """Options by the names of a command's parameters; a list is an option that is given more than once.

    Args:
        source: where they stand, for messages.

    Raises:
        UsageError: something that is no option.
    """
    known = {parameter.name: parameter for parameter in parameters if parameter.name not in (None, "config_file")}
    options = {str(name).replace("-", "_"): value for name, value in found.items()}
    if unknown := sorted(options.keys() - known.keys()):
        raise UsageError(f"{source} sets {', '.join(unknown)}, which the command does not have")
    for name, value in options.items():
        if isinstance(value, bool) and not getattr(known[name], "is_flag", False):
            raise UsageError(f"{source}: {name} must be a text or a number, not {str(value).lower()}: put a text between quotes")
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):  # which no word of a command line can hold
            raise UsageError(f"{source}: {name} must not have a character NUL")
        plain = isinstance(value, str | int | float) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if value is not None and not plain:
            raise UsageError(f"{source}: {name} must be a text, a number, true, false, or a list of texts")
    return {
        name: [value] if known[name].multiple and not isinstance(value, list) else value
        for name, value in options.items()
        if value is not None
    }


def _load(context: typer.Context, file: str | None) -> str | None:
    if file is not None:
        context.default_map = {**(context.default_map or {}), **as_defaults(read_options(file), context.command.params, file)}
    return file


ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", is_eager=True, callback=_load, help="YAML file with options of this command."),
]
