"""Settings are checked where they are made, and the message names the setting."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from specontext.config import EngineConfig, SpeContextConfig
from specontext.errors import ConfigError, SpeContextError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "quest9"},
            "unknown method 'quest9': choose one of full, speculative, streaming, oracle, shared-oracle, random",
        ),
        ({"granularity": "layer"}, "unknown granularity 'layer': choose one of head, union, batch"),
        *(({"sink": value}, "sink must be an integer of at least 1") for value in (0, -1, 1.0, True, None, "4")),
        *(({"recent": value}, "recent must be an integer of at least 1") for value in (0, 2.5, None)),
        *(({"offload_layers": value}, "offload_layers must be an integer of at least -1") for value in (-2, 0.5, True, "1")),
        *(({"budget": value}, "budget must be an integer of at least 1") for value in (0, -3, 64.0, "64", True)),
        *(({"slots": value}, "slots must be an integer of at least 1") for value in (0, 1.5)),
        ({"budget": 20}, r"budget 20 is smaller than sink \+ recent \+ 1 = 21: raise the budget or lower sink or recent"),
        ({"budget": 6, "sink": 2, "recent": 4}, r"sink \+ recent \+ 1 = 7"),
        ({"budget": 64, "slots": 63}, "slots 63 is smaller than the budget 64"),
    ],
)
def test_wrong_settings_of_the_method(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeContextConfig(**settings)


def test_the_smallest_budget_and_equal_slots_are_accepted() -> None:
    assert SpeContextConfig(budget=21).budget == 21
    assert SpeContextConfig(budget=3, sink=1, recent=1, slots=3, offload_layers=-1).slots == 3


@pytest.mark.parametrize(("asked", "recommended", "budget"), [(None, None, 2048), (None, 256, 256), (100, 256, 100)])
def test_the_budget_is_asked_for_or_recommended_or_the_default(asked: int | None, recommended: int | None, budget: int) -> None:
    settings = SpeContextConfig(budget=asked).resolve(recommended_budget=recommended, num_layers=4)
    assert (settings.budget, settings.slots) == (budget, budget)


def test_resolve_fills_in_slots_and_layers() -> None:
    settings = SpeContextConfig(budget=64, slots=80, offload_layers=-1).resolve(recommended_budget=None, num_layers=6)
    assert (settings.slots, settings.offload_layers) == (80, 6)
    assert settings.resolve(recommended_budget=32, num_layers=6) == settings


def test_layers_that_are_not_named_stay_open() -> None:
    """The engine then moves them as memory demands."""
    settings = SpeContextConfig(budget=64)
    assert settings.offload_layers is None
    assert settings.resolve(recommended_budget=None, num_layers=6).offload_layers is None
    assert SpeContextConfig(offload_layers=0).resolve(recommended_budget=None, num_layers=6).offload_layers == 0


def test_resolve_refuses_what_does_not_fit_the_model_or_the_recommended_budget() -> None:
    with pytest.raises(ConfigError, match="offload_layers 7 exceeds the model's 6 layers"):
        SpeContextConfig(offload_layers=7).resolve(recommended_budget=None, num_layers=6)
    with pytest.raises(ConfigError, match="slots 100 is smaller than the budget 256"):
        SpeContextConfig(slots=100).resolve(recommended_budget=256, num_layers=6)
    with pytest.raises(ConfigError, match="budget 256 is smaller than sink"):
        SpeContextConfig(sink=300).resolve(recommended_budget=256, num_layers=6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8': choose one of auto, float32, bfloat16, float16"),
        *(
            ({name: value}, f"{name} must be an integer of at least 1")
            for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_model_len", "gpu_memory", "host_memory")
            for value in (0, -1, 1.5, True, "8")
        ),
        *(({"gpu_memory_utilization": share}, "above 0 and at most 1") for share in (0, -0.1, 1.01, True, "0.9")),
        ({"gpu_memory_utilization": 0.5, "gpu_memory": 1 << 30}, "give one of them"),
        *(({name: "24GiB"}, rf"{name} .* of at least 1 \(bytes\), got '24GiB'") for name in ("gpu_memory", "host_memory")),
        *(({"method": value}, "must be a SpeContextConfig") for value in ({"budget": 64}, None, "full")),
        *(({name: "no"}, f"{name} must be True or False") for name in ("enforce_eager", "trust_remote_code")),
        *(({name: 5}, f"{name} must be a name or a path") for name in ("retrieval_head", "offload_dir")),
        *(({"seed": value}, "seed must be") for value in (2**63, -(2**63) - 1, 1.5, None)),
    ],
)
def test_wrong_settings_of_the_engine(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig("nano", **settings)


def test_settings_are_frozen_and_their_errors_are_the_package_s_own() -> None:
    for settings in (SpeContextConfig(), EngineConfig("nano")):
        with pytest.raises(AttributeError):
            settings.method = "full"  # type: ignore[misc]
    assert issubclass(ConfigError, SpeContextError) and issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("kind", [SpeContextConfig, EngineConfig])
def test_every_setting_says_what_it_means(kind: type) -> None:
    undocumented = {field.name for field in fields(kind) if not field.metadata.get("help")}
    assert undocumented <= {"model", "retrieval_head", "method"}
