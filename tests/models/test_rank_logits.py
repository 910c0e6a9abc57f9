"""What ranks compute together is what one process computes, whatever the architecture; here they are threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, Olmo2Config, PhiConfig

from specontext.errors import ModelError
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.models.decoder import decoder_layers
from specontext.models.split_styles import NORM_OF_ALL_HEADS
from specontext.models.splits import splits_of
from specontext.quantization.linear import QuantizedLinear
from tests.conftest import FAMILIES
from tests.models.architectures import RUN
from tests.models.conftest import Write
from tests.models.quantised_files import FORMATS, write_quantised
from tests.models.rank_threads import check

CPU = torch.device("cpu")
# Of each way in which attention, norms and feed-forward layers are made, one; and settings that the table's examples lack.
SOME: list[tuple[str, dict[str, Any]]] = [
    ("Phi3", {}),
    ("Phi3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    ("Olmo2", {"attention_bias": True}),
    ("MiniMaxM2", {}),
    ("GPT2", {}),
    ("GPTNeoX", {}),
    ("GPTBigCode", {}),
    ("GPTBigCode", {"multi_query": False, "num_key_value_heads": 4}),
    ("CodeGen", {}),
    ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("Cohere", {"use_qk_norm": True}),
    ("StableLm", {"qk_layernorm": True, "use_qkv_bias": True}),
    ("Gemma3Text", {"num_key_value_heads": 1}),
    ("GraniteMoeShared", {}),
    ("NemotronH", {"moe_latent_size": 32}),
    ("Gemma3nText", {}),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("architecture, changes", SOME)
def test_ways_to_make_layers(architecture: str, changes: dict[str, Any], size: int, write: Write, tmp_path: Path) -> None:
    write(architecture, RUN[architecture] | changes)
    check(tmp_path, size)


@pytest.mark.parametrize("name", ["fp8-blocks", "ct-int8", "ct-zeros", "awq"])
def test_codes_of_queries_keys_and_values(name: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one matrix, with borders between heads inside of a scale's block; and of gate and up."""
    write("Phi3", RUN["Phi3"] | {"intermediate_size": 128})
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    write_quantised(tmp_path, tmp_path / name, FORMATS[name])
    part = check(tmp_path / name, 2)
    own = [module.out_features for module in part.model.modules() if isinstance(module, QuantizedLinear)]
    assert own == [64, 64, 128, 64] * 3, "all of what is split keeps its codes, of as many rows"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_all_other_tests(family: str, checkpoint: Callable[[str], Path]) -> None:
    check(checkpoint(family), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "size"), list(zip(RUN, cycle((2, 4)), strict=False)))
def test_every_architecture(architecture: str, size: int, write: Write, tmp_path: Path) -> None:
    write(architecture, RUN[architecture])
    check(tmp_path, size)


def tiny(kind: Callable[..., Any]) -> tuple[Any, ModelShape]:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 64}
    config = kind(**sizes, intermediate_size=64, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config), ModelShape.from_config(config)


def refused(model: Any, shape: ModelShape, named: str) -> None:
    with pytest.raises(ModelError, match=f"cannot be shared among ranks: nothing says how its {named}.*leave tensor_parallel"):
        splits_of(model, shape, Share(0, 2))


def test_a_matrix_of_queries_keys_and_values_in_an_order_that_nothing_says_is_refused() -> None:
    refused(*tiny(FalconConfig), "self_attention.query_key_value")


def test_norms_over_all_heads_are_known_by_what_they_compute() -> None:
    model, shape = tiny(Olmo2Config)
    attention: Any = decoder_layers(model)[0].self_attn
    attention.q_norm = torch.nn.RMSNorm(32, eps=1e-3)
    splits = splits_of(model, shape, Share(0, 2))[0].splits
    assert [split.style for split in splits if split.path == "self_attn.q_norm"] == [NORM_OF_ALL_HEADS]
    attention.q_norm = torch.nn.LayerNorm(32)
    refused(model, shape, "self_attn.q_norm is split, a LayerNorm over all heads")


def test_feed_forward_layers_that_take_in_other_numbers_than_they_bring_are_refused() -> None:
    """As where gate and up are one matrix by another name."""
    model, shape = tiny(PhiConfig)
    feed_forward: Any = decoder_layers(model)[0].mlp
    feed_forward.fc1 = torch.nn.Linear(32, 128)
    refused(model, shape, "mlp.fc1 is split, of whose outputs mlp.fc2 takes another number")
