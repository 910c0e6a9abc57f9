"""Settings of the method and of the engine: frozen, validated where they are made, the source of the CLI's options."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

from specontext.errors import ConfigError, shown
from specontext.retrieval.registry import CHEAP_METHODS, CHOICES, DEFAULT, FULL, METHODS, base_of

GRANULARITIES = ("head", "union", "batch")
LOAD_FORMATS = ("auto", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("fp8", "int4")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
DEFAULT_BUDGET = 2048
STEP_TOKENS = {"cuda": 8192, "cpu": 1024}  # chunks of prompts that use a device well; larger ones gain nothing
# That do not run where several processes share the model: one looks at all heads beforehand, and one pools over them, unless each
# KV head has sets of its own.
WHOLE_METHODS = ("shared-oracle",)
POOLING_METHODS = ("oracle",)
MIXED_TOKENS = 1024  # some 30 ms of an 8B model on an H100, for which requests that decode wait
MOST_SEED = 2**32 - 1
T = TypeVar("T")


def option(default: T, help: str) -> T:
    """A setting's default, with what the CLI says of it."""
    made: T = field(default=default, metadata={"help": help})
    return made


@dataclass(frozen=True)
class SpeContextConfig:
    """How KV entries are chosen and where they live.

    Raises:
        ConfigError: a value out of range, or values that contradict each other.
    """

    method: str = option(DEFAULT, f"Selection method: {', '.join(METHODS)}.")
    budget: int | None = option(
        None,
        "KV entries that attention reads for one KV head and step, sinks and recent window included. "
        "Default: what the retrieval head recommends, else 2048.",
    )
    sink: int = option(4, "First tokens of the context that are always read; inside the budget.")
    recent: int = option(16, "Last tokens of the context that are always read; inside the budget.")
    slots: int | None = option(
        None,
        "Device slots for each KV head of an offloaded layer, at least the budget; what they hold beyond the budget stays "
        "until it is the least recently used. Default: the budget.",
    )
    offload_layers: int | None = option(
        None,
        "Layers whose KV lives in host memory, the last ones first; -1 offloads all. Default: as many as memory makes necessary, "
        "layer by layer while requests grow.",
    )
    granularity: str = option(
        "head",
        "'head' selects for every KV head. One set for all heads: 'union' of shrunk sets, 'batch' by the best score.",
    )

    def __post_init__(self) -> None:
        _require_one_of("method", self.method, METHODS)
        _require_one_of("granularity", self.granularity, GRANULARITIES)
        for name, least in (("sink", 1), ("recent", 1)):
            _require_int(name, getattr(self, name), least)
        if self.offload_layers is not None:
            _require_int("offload_layers", self.offload_layers, -1)
        if self.budget is not None:
            _require_int("budget", self.budget, 1)
            if self.budget < self.sink + self.recent + 1:
                raise ConfigError(
                    f"budget {self.budget} is smaller than sink + recent + 1 = {self.sink + self.recent + 1}: "
                    "raise the budget or lower sink or recent"
                )
        if self.slots is not None:
            _require_int("slots", self.slots, 1)
            if self.budget is not None and self.slots < self.budget:
                raise ConfigError(
                    f"slots {self.slots} is smaller than the budget {self.budget}: slots must hold a whole selection"
                )

    def resolve(self, *, recommended_budget: int | None, num_layers: int) -> SpeContextConfig:
        """The same settings with the open ones (budget, slots, all layers) filled in for one model.

        Raises:
            ConfigError: more layers to offload than the model has.
        """
        if self.offload_layers is not None and self.offload_layers > num_layers:
            raise ConfigError(f"offload_layers {self.offload_layers} exceeds the model's {num_layers} layers (-1 offloads all)")
        budget = self.budget if self.budget is not None else recommended_budget or DEFAULT_BUDGET
        return replace(
            self,
            budget=budget,
            slots=budget if self.slots is None else self.slots,
            offload_layers=num_layers if self.offload_layers == -1 else self.offload_layers,
        )


@dataclass(frozen=True)
class StepTokens:
    """The most tokens of a step.

    Attributes:
        alone: where only prompts are computed.
        mixed: where requests decode, too, and somebody awaits their tokens.
        unawaited: where requests decode, and all that counts is when they have ended.
    """

    alone: int
    mixed: int
    unawaited: int


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model.

    Raises:
        ConfigError: a value out of range.
    """

    model: str | Path
    retrieval_head: str | Path | None = "auto"
    method: SpeContextConfig = field(default_factory=SpeContextConfig)
    dtype: str = option(
        "auto", "Number format of weights, and of KV by default: auto (the checkpoint's), float32, bfloat16 or float16."
    )
    kv_cache_dtype: str = option(
        "auto",
        "Number format of KV in both tiers: auto (that of dtype), or 8 bits with a scale for each key and value, fp8 or int8.",
    )
    host_kv_dtype: str = option(
        "auto",
        "Number format of KV in host memory alone: auto (that of kv_cache_dtype), fp8 or int8. Layers that live there are read "
        "in 8 bits, the others as they are; it needs a fixed offload_layers.",
    )
    device: str = option("auto", "Where the model runs: auto, cpu, cuda or cuda:N.")
    methods: Sequence[str] | None = option(
        None,
        "Methods that requests may name instead of the engine's own, with budgets up to the engine's. Those that keep state of "
        "their own take memory for all requests. Default: full and streaming, unless the engine's own method is full.",
    )
    max_model_len: int | None = option(
        None, "Longest context, prompt and output together, in tokens. Default: the model's own maximum."
    )
    max_num_seqs: int = option(16, "Requests that run at the same time.")
    min_num_seqs: int = option(
        1, "Requests that run at the same time, as far as memory has room, though fewer would make more tokens a second."
    )
    max_tpot_ms: float | None = option(
        None, "Expected milliseconds from token to token beyond which no further request joins. Default: no limit."
    )
    max_wait_s: float | None = option(
        None,
        "Seconds after which a request that waits for the sake of tokens a second joins all the same, if memory has room. "
        "Default: it waits until those before it have ended.",
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Tokens of one engine step; longer prompts are prefilled in chunks. Default: 8192 on a GPU, fewer where its memory is "
        "short, 1024 on a CPU.",
    )
    max_num_mixed_tokens: int | None = option(
        None,
        "Tokens of a step in which requests decode: their next tokens wait for the chunk of a prompt that is computed in it. "
        "At most max_num_batched_tokens. Default: 1024; max_num_batched_tokens where nobody reads tokens as they come "
        "(`LLM.generate`) and max_tpot_ms is not set.",
    )
    gpu_memory: int | None = option(
        None,
        "Bytes of GPU memory that the engine may use, weights and buffers included; on a CPU, bytes of the device tier of KV. "
        "Default: gpu_memory_utilization; on a CPU what max_num_seqs requests of max_model_len tokens need, as far as free.",
    )
    gpu_memory_utilization: float | None = option(
        None, "Share of the GPU's memory that the engine may use, where gpu_memory names no bytes. Default: 0.9."
    )
    host_memory: int | None = option(
        None,
        "Bytes of the host tier of KV. Default: what the requests need, and as much again for known prompts where they are kept, "
        "up to a share of the free memory.",
    )
    offload_dir: Path | None = option(  # noqa: RUF009
        None, "Directory for a file that the host tier of KV is mapped to, instead of memory; on a CPU only."
    )
    enable_prefix_caching: bool = option(
        True, "Keep what is known of prompts in free pages of the host tier, for requests that begin with the same tokens."
    )
    seed: int = option(0, "Seed from which sampled requests that name none get theirs, in the order in which they come.")
    page_size: int = option(16, "Tokens of one KV page.")
    measure_recall: bool = option(
        False, "Measure the share of the true attention that the selection covers (reads all KV; slow)."
    )
    verify_loads: bool = option(False, "Debug: compare every row that attention reads with the host copy.")
    head_rope_theta: float | None = option(None, "RoPE base of the retrieval head. Default: what the head's config says.")
    head_yarn_factor: float | None = option(
        None,
        "YaRN factor of the retrieval head, 1 switches YaRN off. Default: max_model_len over the length it was trained on, "
        "unless its config rules YaRN out.",
    )
    enforce_eager: bool = option(False, "Run every step eagerly: no CUDA graphs.")
    compile: bool = option(True, "Fuse the layers' small operations in captured decode steps of 16-bit models (torch.compile).")
    load_format: str = option(
        "auto", "auto (the checkpoint's weights) or dummy (random weights and head: speed without a checkpoint's weights)."
    )
    quantization: str | None = option(
        None,
        "Round the weights of linear layers when they are loaded: fp8 (8 bits, a scale a row) or int4 (groups of 128). On a GPU "
        "they stay so in memory. Default: as the checkpoint has them; one that is quantised needs no option.",
    )
    tensor_parallel_size: int = option(
        1,
        "GPUs (on a CPU: processes) of this machine that share the model: each has some of its heads, their KV, and a part of "
        "the weights. host_memory is of all of them, gpu_memory of each.",
    )
    trust_remote_code: bool = option(False, "Allow modelling code that comes with a checkpoint.")
    revision: str | None = option(None, "Hub revision of the model.")

    def __post_init__(self) -> None:
        self._check_kinds()
        _require_one_of("dtype", self.dtype, DTYPES)
        _require_one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        self._check_host_format()
        _require_one_of("load_format", self.load_format, LOAD_FORMATS)
        if self.quantization is not None:
            _require_one_of("quantization", self.quantization, QUANTIZATIONS, ", or leave it out")
        _require_int("tensor_parallel_size", self.tensor_parallel_size, 1)
        if self.tensor_parallel_size > 1:
            self._check_shared()
        for name in ("max_num_seqs", "min_num_seqs", "page_size"):
            _require_int(name, getattr(self, name), 1)
        if self.min_num_seqs > self.max_num_seqs:
            raise ConfigError(
                f"min_num_seqs {self.min_num_seqs} exceeds max_num_seqs {self.max_num_seqs}: lower it, or raise max_num_seqs"
            )
        if self.methods is not None:
            _check_methods(self.methods)
            object.__setattr__(self, "methods", tuple(self.methods))
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_mixed_tokens", "gpu_memory", "host_memory"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1, of="bytes" if name.endswith("memory") else "")
        self._check_numbers()

    def _check_kinds(self) -> None:
        """Raises ConfigError for values of another kind than their settings have."""
        if not isinstance(self.method, SpeContextConfig):
            raise ConfigError(f"the settings of the method must be a SpeContextConfig, got {self.method!r}")
        for name in (each.name for each in fields(self) if each.type == "bool"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("model", "retrieval_head", "offload_dir"):
            value = getattr(self, name)
            if value == "" or (value is not None and not isinstance(value, str | os.PathLike)):
                raise ConfigError(f"{name} must be a name or a path, got {value!r}")
        if self.offload_dir is not None:
            object.__setattr__(self, "offload_dir", Path(self.offload_dir))
        _require_int("seed", self.seed, -(2**63))
        if self.seed >= 2**63:
            raise ConfigError(f"seed must be below 2**63, got {self.seed}")

    def _check_numbers(self) -> None:
        """Raises ConfigError for a share, a factor or a time out of range."""
        share = self.gpu_memory_utilization
        if share is not None:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise ConfigError(f"gpu_memory_utilization must be a number above 0 and at most 1, got {share!r}")
            if self.gpu_memory is not None:
                raise ConfigError("gpu_memory and gpu_memory_utilization both bound the GPU's memory: give one of them")
        for name, least, words in (
            ("head_rope_theta", 0, "above 0"),
            ("head_yarn_factor", 1, "of at least 1"),
            ("max_tpot_ms", 0, "above 0"),
            ("max_wait_s", 0, "of at least 0"),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf
            if value is not None and (not number or (value == 0 and words == "above 0")):
                raise ConfigError(f"{name} must be a number {words}, got {value!r}")

    @property
    def host_in_8_bits(self) -> bool:
        """Whether the host's rows are in 8 bits and the device's are not."""
        return self.host_kv_dtype not in ("auto", self.kv_cache_dtype)

    def _check_host_format(self) -> None:
        """Raises ConfigError where the host cannot have rows of its own: reads must not depend on when a layer moved."""
        name, layers = self.host_kv_dtype, self.method.offload_layers
        _require_one_of("host_kv_dtype", name, KV_CACHE_DTYPES)
        if not self.host_in_8_bits:
            return
        if self.kv_cache_dtype != "auto":
            raise ConfigError(
                f"host_kv_dtype {name} and kv_cache_dtype {self.kv_cache_dtype} are two kinds of 8 bits: leave one of them out"
            )
        if layers is None:
            raise ConfigError(
                f"host_kv_dtype {name} needs to know which layers are on the host, since a layer that moves would be read in "
                "other numbers than before: set offload_layers (-1 for all), or kv_cache_dtype instead, which lets layers move"
            )
        if layers == 0:
            raise ConfigError(f"host_kv_dtype {name} does nothing with offload_layers 0: set offload_layers, or leave it out")

    def _check_shared(self) -> None:
        """Raises ConfigError for what does not work where several processes share the model."""
        refused = {
            "measure_recall": self.measure_recall,
            "max_wait_s": self.max_wait_s,
            "offload_dir": self.offload_dir,
        }
        whole = WHOLE_METHODS + (POOLING_METHODS if self.method.granularity != "head" else ())
        refused |= {f"method {name}": base_of(name) in whole for name in self.all_methods}
        for name, value in refused.items():
            if value is not None and value is not False:
                raise ConfigError(
                    f"{name} does not work with tensor_parallel_size {self.tensor_parallel_size}: leave one of them out"
                )
        if self.device.startswith("cuda:"):
            raise ConfigError(
                f"device {self.device} is one GPU and tensor_parallel_size needs several: leave it out, or set it to cuda"
            )

    def step_tokens(self, device_type: str) -> StepTokens:
        """How many tokens steps have on a kind of device.

        Raises:
            ConfigError: more are asked for beside requests that decode than without any.
        """
        most = self.max_num_batched_tokens or STEP_TOKENS[device_type]
        if self.max_num_mixed_tokens is not None and self.max_num_mixed_tokens > most:
            raise ConfigError(
                f"max_num_mixed_tokens {self.max_num_mixed_tokens} exceeds max_num_batched_tokens, which is {most}: lower it, or "
                "raise max_num_batched_tokens"
            )
        mixed = min(self.max_num_mixed_tokens or MIXED_TOKENS, most)
        limited = self.max_num_mixed_tokens is not None or self.max_tpot_ms is not None
        return StepTokens(most, mixed, mixed if limited else most)

    @property
    def all_methods(self) -> tuple[str, ...]:
        """The engine's own method first, then those that requests may name."""
        own = self.method.method
        others = self.methods if self.methods is not None else () if own == FULL else CHEAP_METHODS
        return tuple(dict.fromkeys((own, *others)))


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed of problems, data or weights that not all kinds of random numbers take."""
    if not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed must be from 0 to {MOST_SEED}, got {shown(seed)}")


def _check_methods(names: object) -> None:
    """Raises ConfigError for what is no list of methods."""
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise ConfigError(f"methods must be a list of names, got {names!r}")
    if unknown := [name for name in names if name not in CHOICES]:
        raise ConfigError(f"unknown method '{unknown[0]}' in methods: choose among {', '.join(CHOICES)}")


def _require_one_of(name: str, value: str, choices: Sequence[str], or_else: str = "") -> None:
    if value not in choices:
        raise ConfigError(f"unknown {name} '{value}': choose one of {', '.join(choices)}{or_else}")


def _require_int(name: str, value: object, least: int, *, of: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}{f' ({of})' if of else ''}, got {value!r}")
