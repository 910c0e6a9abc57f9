"""A server process: load, listen, announce, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from specontext.config import EngineConfig
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.long_lived import kept
from specontext.engine.parallel_engine import make_engine
from specontext.errors import ConfigError, SpeContextError
from specontext.server.app import create_app
from specontext.server.errors import DrainingError
from specontext.server.http_protocol import http_protocol
from specontext.server.logs import configure_logging, fields, log_load
from specontext.server.settings import ServerConfig
from specontext.server.state import ServerState

logger = logging.getLogger("specontext.server")

_OPEN_FILES = 65_535
_LAST_WORDS = 1.0  # seconds in which open requests can be told that they have failed
_DEATH_NOTICE = 1.0  # seconds in which /health can still say that the engine is dead


class ServingError(SpeContextError):
    """The server has ended because its engine died."""


def serve(engine_config: EngineConfig, config: ServerConfig, *, announce: Callable[[LLMEngine, str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        announce: called with the engine and the server's address once requests are welcome.

    Raises:
        SpeContextError: settings that do not fit, an address that cannot be had, or an engine that died.
    """
    config.read_chat_template()  # what can fail at once comes before the loading, which takes its time
    with listening_socket(config.host, config.port) as listener:
        configure_logging()
        allow_open_files()
        began = time.perf_counter()
        logger.info("%s", fields("loading", {"model": engine_config.model}))
        with _ended_by_sigterm():
            engine = make_engine(engine_config)
            loaded = time.perf_counter()
            loading = {"seconds": round(loaded - began, 1), "device": engine.device, "next": "warming up"}
            logger.info("%s", fields("loaded", loading))
            engine.warm_up()
            logger.info("%s", fields("warm", {"seconds": round(time.perf_counter() - loaded, 1), "next": "listening"}))
        with kept(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(Serving(engine, config, listener, announce).run())


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process, also the first one of a container, which the system itself would not end."""
    if threading.current_thread() is not threading.main_thread():  # nobody else is told of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


class Serving:
    """One life of a server."""

    def __init__(
        self, engine: LLMEngine, config: ServerConfig, listener: socket.socket, announce: Callable[[LLMEngine, str], None]
    ) -> None:
        self.config, self.listener, self.announce = config, listener, announce
        self.state = ServerState(engine, config)
        self.state.engine.on_death = self._engine_died
        self.server = _UvicornServer(
            uvicorn.Config(
                create_app(self.state),
                http=http_protocol(
                    config.receive_timeout, log=not config.disable_log_requests, refused=self.state.metrics.refused
                ),
                ws="none",
                timeout_keep_alive=config.timeout_keep_alive,  # type: ignore[arg-type]  # of seconds, whole or not
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=max(1, round(config.shutdown_timeout + 5)),  # behind our own limit
            )
        )
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        if threading.current_thread() is threading.main_thread():  # nobody else is told of signals
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        self.state.engine.start()
        watch = asyncio.create_task(self._watch())
        try:
            await self.state.engine.settled()
            await self.server.serve(sockets=[self.listener])
        finally:
            watch.cancel()
            if self._draining is not None:
                self._draining.cancel()
            await self.state.engine.close()
            self.state.encoder.close()
        if self.state.engine.on_death is None:
            raise ServingError(f"{self.state.engine.error}; see the log")

    def stop(self) -> None:
        """Take no more requests, let the open ones finish, then end; asked twice, the open ones fail with 503, then end."""
        if self._draining is not None:
            self._draining.cancel()
            self.state.engine.abort_all(DrainingError("the server is shutting down and does not wait for this request"))
            asyncio.get_running_loop().call_later(_LAST_WORDS, setattr, self.server, "force_exit", True)
            return
        logger.info(
            "shutting down: waiting up to %g s for %d outputs", self.config.shutdown_timeout, self.state.engine.open_outputs
        )
        self.server.should_exit = True  # uvicorn closes the socket and waits for open connections
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if not await self.state.drain(self.config.shutdown_timeout):
            logger.warning("the shutdown timeout is over: what was still running has been ended")

    async def _watch(self) -> None:
        while not self.server.started:
            await asyncio.sleep(0.01)
        host, port = self.listener.getsockname()[:2]
        self.announce(self.state.engine.engine, f"http://{f'[{host}]' if ':' in host else host}:{port}")
        if self.config.log_interval:
            await log_load(self.state.engine, self.config.log_interval)

    def _engine_died(self) -> None:
        self.state.engine.on_death = None
        asyncio.get_running_loop().call_later(_DEATH_NOTICE, setattr, self.server, "should_exit", True)


class _UvicornServer(uvicorn.Server):
    """Leaves signals to `Serving`, so that a drained process ends with status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket; connections are accepted once a server listens on it.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error
        yield listener


def allow_open_files() -> None:
    """Raise the limit of open files, of which each connection is one: many systems begin with 1,024, and refuse what is above."""
    try:
        import resource
    except ImportError:  # it does not exist for every platform
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # it does not exist for every platform
        return asyncio.new_event_loop
    return uvloop.new_event_loop
