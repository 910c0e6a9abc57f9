"""A deployment put together, and brought onto a cluster."""

from __future__ import annotations

import math
import os
import socket
from typing import Any

from specontext.config import EngineConfig
from specontext.errors import SpeContextError
from specontext.installing import install_command
from specontext.integrations.ray_serve.settings import DeployConfig

try:
    import ray
    from ray import serve
    from ray.serve import Application
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
    from ray.serve.context import _get_global_client
except ImportError as error:
    raise SpeContextError(f"Ray Serve is not installed: {install_command('ray')} ({error})") from error

from specontext.integrations.ray_serve.ingress import Ingress
from specontext.integrations.ray_serve.replica import EngineReplica

NAME = "specontext"  # of the application in Ray Serve
_ROUTER = "specontext.integrations.ray_serve.router.PrefixRouter"
_SCALE = "specontext.integrations.ray_serve.scaling:scale"
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}  # replicas write the lines of requests
# Ray Serve's own switches, which each of its processes reads: one event loop and gRPC, which halve what a chunk costs; no port of
# its own for each ingress, which would wait half a minute for a load balancer before it ends; and standard error left to our log.
FAST = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0", "RAY_SERVE_LOG_TO_STDERR": "1"}
_MORE = 64  # calls beside those that run and wait in an engine: what is refused, models, token counts
_PATIENCE = 10.0  # seconds for a cluster's head to take a connection
_TRIES = 3  # at starting a replica; what does not fit does not fit later either


class DeployError(SpeContextError):
    """The cluster could not run what was deployed."""


def application(engine: EngineConfig, config: DeployConfig) -> Application:
    """What Ray Serve runs: replicas of an engine, and what stands before them; where `replica_gpus` is None, asks the cluster."""
    fast = {"runtime_env": {"env_vars": FAST}}
    replicas = serve.deployment(
        EngineReplica,
        name="Replica",
        max_ongoing_requests=engine.max_num_seqs + config.max_queued_requests + _MORE,
        graceful_shutdown_timeout_s=config.shutdown_timeout,
        graceful_shutdown_wait_loop_s=1.0,
        health_check_period_s=5.0,
        max_constructor_retry_count=_TRIES,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": _gpus(engine, config), **fast},
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"routing": config.routing}
        ),
        **_count(config),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=config.ingresses,
        max_ongoing_requests=1 << 20,  # replicas refuse what is too much
        max_surge_percent=100,  # there is always one
        graceful_shutdown_timeout_s=config.shutdown_timeout + 5,
        graceful_shutdown_wait_loop_s=1.0,
        ray_actor_options={"num_cpus": 0, **fast},
    )
    return ingress.bind(replicas.bind(engine, config), config)


def connect(address: str | None) -> bool:
    """Join a cluster; whether it goes on when this process ends.

    Args:
        address: as `ray.init` has it; None is the cluster that runs on this machine, else a new one of this process.

    Raises:
        DeployError: nobody answers there.
    """
    options = {"namespace": NAME, "logging_level": "warning"}
    if address != "local":
        _check_that_somebody_answers(address)
        try:
            ray.init(address=address or "auto", **options)
            return True
        except (ConnectionError, ValueError) as error:
            if address is not None:
                raise DeployError(f"no Ray cluster answers at {address}: start one with `ray start --head` ({error})") from error
    for name, value in FAST.items():  # the proxies of our own cluster
        os.environ.setdefault(name, value)
    ray.init(address="local", **options)
    return False


def _check_that_somebody_answers(address: str | None) -> None:
    """Raises DeployError where nobody listens at an address; Ray itself would go on asking for minutes."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdigit():  # another way to name a cluster
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise DeployError(f"no Ray cluster answers at {address}: start one with `ray start --head` ({error})") from error


def shortage(engine: EngineConfig, config: DeployConfig) -> str | None:
    """What replicas reserve beyond what the cluster has now, in a sentence."""
    has, gpus = ray.cluster_resources(), _gpus(engine, config)
    for name, key, each in (("GPUs", "GPU", gpus), ("CPUs", "CPU", config.replica_cpus)):
        if each * config.replicas > has.get(key, 0.0):
            wanted = f"{config.replicas} replicas reserve {each * config.replicas:g} {name}"
            return f"{wanted} and the cluster has {has.get(key, 0.0):g}: some wait until nodes with more join"
    return None


def run(engine: EngineConfig, config: DeployConfig) -> str:
    """Run an application, in place of an earlier one replica by replica; its address, once it is ready.

    Raises:
        DeployError: another address of Ray Serve, or replicas that do not start.
    """
    config.read_chat_template()  # what can fail at once comes first
    try:
        idle = math.ceil(config.timeout_keep_alive)  # Ray knows whole seconds
        http = {"host": config.host, "port": config.port, "keep_alive_timeout_s": idle}
        serve.start(http_options=http, proxy_location="EveryNode", logging_config=_LOGGING)
    except RuntimeError as error:
        raise DeployError(f"Ray Serve did not start: {_reason(str(error))}") from error
    now = _get_global_client().http_config
    if (now.host, now.port) != (config.host, config.port):
        raise DeployError(
            f"Ray Serve listens on {now.host}:{now.port} in this cluster: deploy with --host {now.host} --port {now.port}, "
            "or end it with `serve shutdown`"
        )
    try:
        serve.run(application(engine, config), name=NAME, route_prefix="/", logging_config=_LOGGING)
    except RuntimeError as error:
        raise DeployError(f"the replicas did not start: {_reason(_all_that_is_said(str(error)))}") from error
    return f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"


def withdraw() -> None:
    """End what runs, after the requests that are open."""
    serve.delete(NAME)
    serve.shutdown()
    ray.shutdown()


def _gpus(engine: EngineConfig, config: DeployConfig) -> float:
    """GPUs of one replica."""
    if config.replica_gpus is not None:
        return config.replica_gpus
    if engine.device == "cpu" or not ray.cluster_resources().get("GPU"):
        return 0.0
    return float(engine.tensor_parallel_size)


def _count(config: DeployConfig) -> dict[str, Any]:
    """How many replicas there are: always as many, or as many as their use asks for."""
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    scaling = AutoscalingConfig(
        min_replicas=config.replicas,
        max_replicas=config.max_replicas,
        upscale_delay_s=config.upscale_delay,
        downscale_delay_s=config.downscale_delay,
        policy=AutoscalingPolicy(policy_function=_SCALE),
    )
    return {"autoscaling_config": scaling}


def _all_that_is_said(error: str) -> str:
    """An error of Ray Serve with what its deployments say: it may name them alone, and they have the traceback."""
    found = serve.status().applications.get(NAME)
    messages = [one.message for one in found.deployments.values()] if found is not None else []
    return "\n".join([error, *messages])


def _reason(text: str) -> str:
    """The error of a replica's constructor, which stands last in a traceback; of our own without its class."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith("Error") and " " in line]
    found = (errors or lines or ["see the logs of Ray Serve"])[-1]
    return found.partition(": ")[2] if found.startswith(f"{SpeContextError.__module__}.") else found
