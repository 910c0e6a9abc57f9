"""Settings of a deployment on Ray Serve; the CLI derives its options from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from specontext.errors import ConfigError
from specontext.server.settings import ServerConfig

ROUTINGS = ("prefix", "balanced")


def _option(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DeployConfig(ServerConfig):
    """What a server is told, how many there are of it, and what each may use.

    Raises:
        ConfigError: a value out of range.
    """

    replicas: int = _option(1, "Copies of the model, each with KV of its own.")  # type: ignore[assignment]
    max_replicas: int | None = _option(  # type: ignore[assignment]
        None, "Start more replicas, up to this many, while requests wait or KV is short. Default: as many as --replicas."
    )
    upscale_delay: float = _option(  # type: ignore[assignment]
        30.0, "Seconds for which more replicas must have been wanted before they are started."
    )
    downscale_delay: float = _option(  # type: ignore[assignment]
        600.0, "Seconds for which fewer replicas must have been enough before some are ended."
    )
    routing: str = _option(  # type: ignore[assignment]
        "prefix",
        "Which replica answers: prefix (the one that knows the prompt's beginning, unless it has too much to do) or balanced.",
    )
    ingresses: int = _option(  # type: ignore[assignment]
        1, "Processes that read requests and choose replicas; they need no GPU."
    )
    replica_cpus: float = _option(1.0, "CPUs that a replica reserves; on a CPU also its threads.")  # type: ignore[assignment]
    replica_gpus: float | None = _option(  # type: ignore[assignment]
        None, "GPUs that a replica reserves. Default: 1, or none with --device cpu and where the cluster has no GPU."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = (("replicas", 1), ("ingresses", 1), ("replica_cpus", 0), ("upscale_delay", 0), ("downscale_delay", 0))
        for name, least in bounds:
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas must be at least replicas, {self.replicas}, got {self.max_replicas}")
        if self.replica_gpus is not None and not self.replica_gpus >= 0:
            raise ConfigError(f"replica_gpus must be at least 0, got {self.replica_gpus!r}")
        if self.routing not in ROUTINGS:
            raise ConfigError(f"unknown routing '{self.routing}': choose one of {', '.join(ROUTINGS)}")
        if self.port == 0:
            raise ConfigError("port must be a number that every node of the cluster can listen on, not 0")
