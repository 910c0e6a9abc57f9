"""`specontext deploy`: replicas of the server on a Ray cluster, and the same options for Ray Serve's own files."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from specontext.cli.api_keys import keys_of_environment
from specontext.cli.config_file import ConfigFile, as_defaults
from specontext.cli.options import BATCH_OPTIONS, ENGINE_OPTIONS, Settings, with_settings
from specontext.cli.terminal import MODEL_HELP, UsageError, error_console
from specontext.config import EngineConfig
from specontext.integrations.ray_serve.settings import DeployConfig

if TYPE_CHECKING:
    from ray.serve import Application


_NOT_OURS = {"host", "port", "address"}  # of options, where Ray Serve has been started by others


@dataclass(frozen=True)
class Wanted:
    """What the options said."""

    engine: EngineConfig
    config: DeployConfig
    address: str | None
    note: str


@with_settings(engine=(*ENGINE_OPTIONS, *BATCH_OPTIONS, "methods"), others=DeployConfig)
def _wanted(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    config_file: ConfigFile = None,
    retrieval_head: Annotated[
        str, typer.Option("--retrieval-head", metavar="DIR|auto|none", help="Retrieval head; 'auto' takes the checkpoint's own.")
    ] = "auto",
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, as ray.init has it: HOST:PORT, auto, or local for a new one. Default: the one that runs on this "
            "machine, else a new one, which ends with this command.",
        ),
    ] = None,
    settings: Settings,
) -> Wanted:
    """Serve a model with several replicas on a Ray cluster, behind one address; needs specontext[ray].

    On a cluster that runs already, the command ends when all replicas are ready; given again, it replaces them one by one.
    """
    config = DeployConfig(**({"api_key": keys} if (keys := keys_of_environment()) else {}) | settings.others)
    changed = ({"retrieval_head": retrieval_head} if retrieval_head != "auto" else {}) | settings.changed
    head = None if retrieval_head == "none" else retrieval_head
    engine = EngineConfig(model, head, settings.config, **settings.engine)
    return Wanted(engine, config, address, Settings(settings.config, {}, changed).describe())


@functools.wraps(_wanted)
def deploy(**options: Any) -> None:
    wanted = _wanted(**options)
    console = error_console()
    if wanted.note:
        console.print(escape(f"non-default options: {wanted.note}"), style="dim")
    from specontext.integrations.ray_serve import application as ray_serve

    stays = ray_serve.connect(wanted.address)
    if short := ray_serve.shortage(wanted.engine, wanted.config):
        console.print(escape(short), style="yellow")
    address = ray_serve.run(wanted.engine, wanted.config)
    print(f"ready: {wanted.config.replicas} replicas of {wanted.engine.model} at {address}", flush=True)
    if not stays:
        _until_told()
        ray_serve.withdraw()


def application(args: Mapping[str, Any]) -> Application:
    """For Ray Serve's files and KubeRay, whose `import_path` is `specontext.cli.deploy:application`.

    Args:
        args: `model`, and options of `specontext deploy` by name, as its `--config` file has them.

    Raises:
        UsageError: something in them that is no option.
    """
    wanted = wanted_of(args)
    from specontext.integrations.ray_serve import application as ray_serve

    return ray_serve.application(wanted.engine, wanted.config)


def wanted_of(args: Mapping[str, Any]) -> Wanted:
    """What `args` of an application say; raises as `application`."""
    options = dict(args)
    model = options.pop("model", None)
    if others := sorted(_NOT_OURS & options.keys()):
        raise UsageError(
            f"{', '.join(others)} cannot stand in the args of an application: Ray Serve's http_options say where it listens"
        )
    if not isinstance(model, str):
        raise UsageError("the args of the application must name a model, as in `model: nano`")
    single = typer.Typer(add_completion=False)
    single.command()(_wanted)
    command = typer.main.get_command(single)
    defaults = as_defaults(options, command.params, "the args of the application")
    wanted: Wanted = command.main([model], standalone_mode=False, default_map=defaults)
    return wanted


def _until_told() -> None:
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    told.wait()
