"""What modelling code does beyond plain causal attention is caught by what it hands to attention, or by what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from specontext.errors import ModelError
from specontext.model_shape import ModelShape
from specontext.models import attention
from specontext.models.attention import ATTENTION_NAME, register_attention, understood
from specontext.models.checking import check_attention
from specontext.models.tolerance import differ
from tests.conftest import randomise

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
Eager = Callable[..., tuple[Tensor, Tensor]]


def make(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, *, wide: bool = True) -> PreTrainedModel:
    """A model as it is loaded; with the weights that transformers draws unless they are wide."""
    register_attention()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    if wide:
        randomise(model, seed=1)
    return model.eval()


def check(model: PreTrainedModel) -> None:
    check_attention(model, ModelShape.from_config(model.config, model.dtype))


def llama4(**changes: Any) -> PreTrainedConfig:
    """All layers full, and none with RoPE: their queries grow with the position that the cache tells them."""
    sizes = SIZES | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2, "layer_types": ["full_attention"] * 2}
    return transformers.Llama4TextConfig(**sizes | {"no_rope_layers": [0, 0], "max_position_embeddings": 512} | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_positions_from_the_cache_are_noticed(dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "at_positions", lambda _, query, __: query)
    for far in (llama4(max_position_embeddings=1 << 17), llama4(floor_scale=16)):
        with pytest.raises(
            ModelError, match=r"makes other queries here than in the library, .* positions from the library's cache"
        ):
            check(make(far, dtype, wide=wide))
    check(make(llama4(), dtype, wide=wide))  # up to its floor_scale of 8,192 tokens nothing grows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_4_s_temperature_follows_positions(dtype: torch.dtype) -> None:
    for far in (llama4(max_position_embeddings=1 << 17), llama4(floor_scale=16)):
        check(make(far, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_no_false_alarm_with_experts_in_16_bits(dtype: torch.dtype, wide: bool) -> None:
    experts = SIZES | {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    for seed in range(3):
        model = make(transformers.Qwen3MoeConfig(**experts, num_local_experts=16), dtype, wide=wide)
        if wide:
            randomise(model, seed)
        check(model)


def test_no_false_alarm_where_numbers_are_not_finite() -> None:
    model = make(LlamaConfig(**SIZES))
    model.get_input_embeddings().weight.data[17] = float("inf")
    check(model)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Eager], None]]:
    """eager(function) makes it Llama's own attention in the library."""
    yield lambda function: monkeypatch.setattr(modeling_llama, "eager_attention_forward", function)


def test_another_formula_in_the_library_is_noticed(eager: Callable[[Eager], None]) -> None:
    own = modeling_llama.eager_attention_forward

    def windowed(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        far = torch.ones(mask.shape[-2:], dtype=torch.bool).tril(mask.shape[-1] - mask.shape[-2] - 3)
        return own(module, query, key, value, mask.masked_fill(far, -1e30), **options)

    def capped(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * options["scaling"]
        weights = (2 * torch.tanh(logits / 2) + mask).softmax(-1)
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), weights

    def sinking(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        output, weights = own(module, query, key, value, mask, **options)
        return output * 0.8, weights

    check(make(LlamaConfig(**SIZES)))
    for function in (windowed, capped, sinking):
        eager(function)
        with pytest.raises(ModelError, match="own attention of layer 0 gives other results than causal softmax attention"):
            check(make(LlamaConfig(**SIZES)))


def test_a_window_that_the_library_does_not_compute_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.MistralConfig(**SIZES, max_position_embeddings=512, sliding_window=64)
    check(make(config))
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask)
    with pytest.raises(ModelError, match=r"attention of layer 0 gives other results than causal .* attention over its window"):
        check(make(config))
    assert config.sliding_window == 64, "whatever happens, the config is as it was"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"softcap": -30.0}, r"softcap=-30\.0"),
        ({"s_aux": 0.5}, r"s_aux=0\.5"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"sliding_window": 64}, "sliding_window=64"),
        ({"is_causal": False}, "is_causal=False"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "cu_seq_lens_q"),
        ({"something_new": True}, "something_new=True"),
    ],
)
def test_keywords_that_change_attention_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    model = make(LlamaConfig(**SIZES, max_position_embeddings=512))
    handing(model, options)
    with pytest.raises(ModelError, match=f"LlamaForCausalLM is not supported: it hands its attention '{name}'"):
        check(model)


def test_keywords_without_effect_are_none(recwarn: pytest.WarningsRecorder) -> None:
    model = make(LlamaConfig(**SIZES, max_position_embeddings=512))
    harmless = {"softcap": None, "s_aux": None, "is_causal": True, "output_attentions": True, "sliding_window": 512}
    handing(model, harmless | {"something_new": False})
    check(model)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_dropout_is_for_training() -> None:
    understood(None, {"dropout": 0.0})
    with pytest.raises(ModelError, match=r"'dropout=0\.1'"):
        understood(None, {"dropout": 0.1})


def handing(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Let the layers of a model hand these keywords to attention."""

    def add(_: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | options

    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(add, with_kwargs=True)


def test_a_mask_of_the_model_s_own_is_refused() -> None:
    model = make(LlamaConfig(**SIZES))
    handing(model, {"attention_mask": torch.zeros(1, 1, 1, 1)})
    with pytest.raises(ModelError, match="it hands its attention a mask of its own"):
        check(model)


@pytest.mark.parametrize("max_position", [1, 3, 9, 10])
def test_contexts_shorter_than_the_check(max_position: int) -> None:
    with warnings.catch_warnings():
        check(make(LlamaConfig(**SIZES, max_position_embeddings=max_position)))


def test_the_model_is_left_as_it_was() -> None:
    model = make(LlamaConfig(**SIZES))
    check(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    with pytest.raises(RuntimeError, match=r"run it through specontext\.LLM"):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_differences_are_shares_of_the_norm() -> None:
    x = torch.randn(50, 8)
    assert not differ(x, x * 1.001, 0.01) and differ(x, x * 1.1, 0.01) and differ(x, x[:3], 0.01)
    holes = x.clone()
    holes[3] = float("nan")
    assert not differ(holes, x, 0.01)
