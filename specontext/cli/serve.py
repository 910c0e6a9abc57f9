"""`specontext serve`: the OpenAI-compatible server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from specontext.cli.config_file import ConfigFile
from specontext.cli.options import ENGINE_OPTIONS, Settings, with_settings
from specontext.cli.terminal import error_console, human_bytes, quiet_libraries
from specontext.server.settings import ServerConfig

if TYPE_CHECKING:
    from specontext.engine.llm_engine import LLMEngine


@with_settings(engine=(*ENGINE_OPTIONS, "max_num_seqs", "methods"), others=ServerConfig)
def serve(
    model: Annotated[str, typer.Argument(help="'nano' (bundled), a checkpoint directory or a Hub id.", show_default=False)],
    *,
    config_file: ConfigFile = None,
    retrieval_head: Annotated[
        str, typer.Option("--retrieval-head", metavar="DIR|auto|none", help="Retrieval head; 'auto' takes the checkpoint's own.")
    ] = "auto",
    settings: Settings,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does: chat and text completions, streaming, metrics, a status page.

    Ends after SIGTERM or Ctrl-C, when the running requests are done.
    """
    config = ServerConfig(**settings.others)
    changed = ({"retrieval_head": retrieval_head} if retrieval_head != "auto" else {}) | settings.changed
    if changed:
        error_console().print(escape(f"non-default options: {Settings(settings.config, {}, changed).describe()}"), style="dim")
    quiet_libraries()
    from specontext.config import EngineConfig
    from specontext.server.run import serve as run

    head = None if retrieval_head == "none" else retrieval_head
    run(EngineConfig(model, head, settings.config, **settings.engine), config, announce=announce)


def announce(engine: LLMEngine, address: str) -> None:
    """Say what was set up, and that requests are welcome."""
    error_console().print(escape(describe(engine)), style="dim")
    print(f"ready: {engine.loaded.name} at {address}", flush=True)


def describe(engine: LLMEngine) -> str:
    """The tiers in a line: tokens that each can hold, and how many requests of full length run at once."""
    parts, shape = engine.parts, engine.loaded.shape
    method = parts.method
    device, host, offloaded = parts.kv.arena, parts.kv.host, len(parts.kv.offloaded)
    sizes = f"device KV {human_bytes(device.num_bytes)}, host KV {human_bytes(host.num_bytes)}"
    layers = f"{shape.layers - offloaded} layers on the device, {offloaded} in host memory"
    if method.offload_layers is None:
        layers += " to begin with"
    chosen = method.method if method.method == "full" else f"{method.method}, budget {method.budget}"
    return (
        f"{chosen} | {layers} | {sizes} | "
        f"up to {engine.config.max_num_seqs} requests at once, contexts of up to {parts.max_tokens} tokens"
    )
