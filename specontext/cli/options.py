"""Command-line options made from the fields of the settings: name, type, default and help stand in `config.py` only."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from specontext.cli.terminal import UsageError, named_path
from specontext.config import EngineConfig, SpeContextConfig
from specontext.errors import shown

ENGINE_OPTIONS = (
    "dtype",
    "kv_cache_dtype",
    "host_kv_dtype",
    "device",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_mixed_tokens",
    "gpu_memory",
    "gpu_memory_utilization",
    "host_memory",
    "offload_dir",
    "enable_prefix_caching",
    "enforce_eager",
    "compile",
    "seed",
    "head_rope_theta",
    "head_yarn_factor",
    "measure_recall",
    "load_format",
    "quantization",
    "tensor_parallel_size",
    "trust_remote_code",
    "revision",
)
OWN_CODE = ("trust_remote_code",)  # of verbs that read a model and make no engine of it
BATCH_OPTIONS = ("max_num_seqs", "min_num_seqs", "max_tpot_ms", "max_wait_s")  # of verbs that run several requests at once
SIZES = ("gpu_memory", "host_memory", "max_body_size")
SECRETS = ("api_key",)
SHORT = {"tensor_parallel_size": ("-tp",)}
UNITS = {"": 1, "B": 1, **{f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", start=1)}}
UNITS |= {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", start=1)}
MOST = (1 << 63) - 1  # bytes that a machine can count


@dataclass(frozen=True)
class Settings:
    """What the options said.

    Attributes:
        config: settings of the method.
        engine: keyword options of `LLM`.
        changed: options that differ from their defaults, as they were written.
        others: fields of further settings.
    """

    config: SpeContextConfig
    engine: dict[str, Any]
    changed: dict[str, object]
    others: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """The changed options in one line, secrets hidden; empty where there are none."""
        return ", ".join(f"{name}={'***' if name in SECRETS else value}" for name, value in self.changed.items())


def refuse_unused(context: typer.Context, reasons: Mapping[str, str]) -> None:
    """Raises UsageError for an option that was given and that nothing would look at.

    Args:
        reasons: when it means nothing, by the name of its parameter.
    """
    for name, when in reasons.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
            raise UsageError(f"{option} has no effect {when}: leave it out")


def parse_size(text: str) -> int:
    """Bytes of a size such as `24GiB`, `4096MiB`, `1.5GB` or a plain number of bytes.

    Raises:
        UsageError: not a size of at least one byte.
    """
    size = _units(text)
    if size is None:
        raise UsageError(
            f"{shown(text)} is not a size: write {_meant(text) or 'for example 24GiB, 4096MiB or a number of bytes'}"
        )
    if size < 1:
        raise UsageError(f"the size '{text}' must be at least one byte")
    return size


def parse_bandwidth(text: str) -> int:
    """Bytes a second of a bandwidth such as `3.3TB/s` or `50GB/s`.

    Raises:
        UsageError: not a bandwidth of at least one byte a second.
    """
    amount, slash, second = text.partition("/")
    speed = _units(amount) if slash and second.strip() == "s" else None
    if speed is None:
        raise UsageError(f"{shown(text)} is not a bandwidth: write for example 3.3TB/s or 50GB/s")
    if speed < 1:
        raise UsageError(f"the bandwidth '{text}' must be at least one byte a second")
    return speed


def _units(text: str) -> int | None:
    """A number with a unit of bytes, rounded down; None for anything else, also what no machine counts."""
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        return None
    size = int(Fraction(match[1]) * units[match[2].lower()])
    return size if size <= MOST else None


def _meant(text: str) -> str | None:
    """What a number with a misspelt unit was probably meant to be: `24G` is 24GiB."""
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGTkmgt])\D*", text)
    meant = f"{match[1]}{match[2].upper()}iB" if match else None
    return meant if meant and _units(meant) else None


def with_settings(
    *, method: Sequence[str] | None = None, engine: Sequence[str] = ENGINE_OPTIONS, others: type | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of the settings; they arrive together as its keyword argument `settings`.

    Args:
        method: fields of SpeContextConfig that become options, None for all.
        engine: fields of EngineConfig that become options.
        others: a further settings class, all of whose fields become options.
    """
    of_method = _options(SpeContextConfig, method)
    of_engine = _options(EngineConfig, engine)
    of_others = _options(others, None) if others is not None else {}
    generated = of_method | of_engine | of_others

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)

        def run(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in generated}
            changed = {name: value for name, value in chosen.items() if value != generated[name].default}
            config = SpeContextConfig(**{name: chosen[name] for name in of_method})
            options = {name: _value(name, chosen[name]) for name in of_engine}
            further = {name: value for name in of_others if (value := _value(name, chosen[name])) is not None}
            return command(**values, settings=Settings(config, options, changed, further))

        parameters = [p for p in own.parameters.values() if p.name != "settings"]
        signature = own.replace(parameters=[*parameters, *generated.values()])
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _options(settings: type, names: Sequence[str] | None) -> dict[str, inspect.Parameter]:
    """Command parameters for the named fields of a settings class."""
    types = get_type_hints(settings)
    known = {field.name: field for field in fields(settings)}
    return {name: _parameter(known[name], types[name]) for name in (known if names is None else names)}


def _parameter(setting: Field[Any], kind: Any) -> inspect.Parameter:
    flag = "--" + setting.name.replace("_", "-")
    size, path = setting.name in SIZES, Path in get_args(kind)
    default: Any = setting.default
    if size:
        kind, default = str | None, None if default is None else f"{default // 2**20}MiB"
    elif {tuple, Sequence} & {get_origin(one) for one in (kind, *get_args(kind))}:
        kind, default = list[str] | None, None
    elif default is True:
        flag += "/--no-" + setting.name.replace("_", "-")
    option = typer.Option(
        *(flag, *SHORT.get(setting.name, ())),
        help=setting.metadata["help"],
        metavar="SIZE" if size else "DIR" if path else None,
        parser=named_path if path else None,
        show_default=default is not None,
    )
    assert kind is bool or {*get_args(kind), kind} & {int, float, str, Path, list[str]}, f"no option type for {setting.name}"
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value) or None  # an option that was not given
    return parse_size(value) if name in SIZES and value is not None else value
