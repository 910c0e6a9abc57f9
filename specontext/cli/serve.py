"""`specontext serve`: the OpenAI-compatible server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from specontext.cli.api_keys import keys_of_environment
from specontext.cli.config_file import ConfigFile
from specontext.cli.options import BATCH_OPTIONS, ENGINE_OPTIONS, Settings, with_settings
from specontext.cli.terminal import MODEL_HELP, error_console, human_bytes, quiet_libraries
from specontext.server.settings import ServerConfig

if TYPE_CHECKING:
    from specontext.engine.llm_engine import LLMEngine


@with_settings(engine=(*ENGINE_OPTIONS, *BATCH_OPTIONS, "methods"), others=ServerConfig)
def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
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
    config = ServerConfig(**({"api_key": keys} if (keys := keys_of_environment()) else {}) | settings.others)
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
    """The plan in a line: layers and tiers, tokens that each tier can hold, and how many requests of full length run at once."""
    parts, layers = engine.parts, engine.loaded.shape.layers
    method, offloaded = parts.method, len(parts.kv.offloaded)
    places = f"{layers - offloaded} layers on the device, {offloaded} in host memory"
    if method.offload_layers is None:
        places += " to begin with"
    chosen = method.method if method.method == "full" else f"{method.method}, budget {method.budget}"
    on_device, on_host = _tokens(engine)
    device = f"device KV {human_bytes(parts.kv.arena.num_bytes)}{on_device}"
    host = f"host KV {human_bytes(parts.kv.host.num_bytes)}{on_host}"
    seats, longest = engine.config.max_num_seqs, parts.max_tokens
    full = next((n for n in range(seats, 0, -1) if parts.residency.fits_somehow([longest] * n)), 0)
    rest = "" if full == seats else f", {seats} shorter ones"
    note = "" if engine.loaded.weights_note is None else f" | weights {engine.loaded.weights_note}"
    return f"{chosen} | {places} | {device}, {host} | {full} requests of {longest} tokens at once{rest}{note}"


def _tokens(engine: LLMEngine) -> tuple[str, str]:
    """How many tokens of all requests together each tier can hold: the device before a layer leaves it, the host in the end."""
    parts, seats = engine.parts, engine.config.max_num_seqs
    cost, offloaded = parts.residency.cost, len(parts.kv.offloaded)
    layers_on_host = offloaded if parts.method.offload_layers is not None else cost.layers
    each = cost.token(offloaded), cost.host_layers(layers_on_host) * cost.host_token
    rooms = parts.kv.arena.num_bytes - cost.slots(seats, offloaded), parts.kv.host.num_bytes - cost.host_fixed
    device, host = (f" ({max(0, room) // size:,} tokens)" if size else "" for room, size in zip(rooms, each, strict=True))
    return device, host
