"""What ranks compute together is what one process computes, whatever the architecture; here they are threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig, Olmo2Config, PhiConfig

from specontext.errors import ModelError
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.models.attention import attention_of
from specontext.models.decoder import decoder_layers
from specontext.models.loading import LoadedModel, load_model
from specontext.models.ranks import Ranks
from specontext.models.split_styles import NORM_OF_ALL_HEADS
from specontext.models.splits import splits_of
from specontext.quantization.linear import QuantizedLinear
from tests.models.architectures import RUN
from tests.models.conftest import Write
from tests.models.quantised_files import FORMATS, write_quantised

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


def logits_of(loaded: LoadedModel) -> Tensor:
    """Of 60 tokens, with the library's own attention, so that all that is tried is what ranks have of the weights."""
    with torch.no_grad(), attention_of(loaded.model, "eager"):
        logits: Tensor = loaded.model(input_ids=4 + 7 * torch.arange(60)[None], use_cache=False).logits
    return logits[0]


def check(folder: Path, size: int) -> LoadedModel:
    """Compares them; the last rank's part."""
    first = Ranks(Share(0, size))
    all_ranks = [first, *(Ranks(Share(rank, size), first.port) for rank in range(1, size))]
    parts = [load_model(folder, dtype="float32", device=CPU, ranks=ranks) for ranks in all_ranks]

    def run(ranks: Ranks, part: LoadedModel) -> Tensor:
        ranks.connect(CPU)
        try:
            return logits_of(part)
        finally:
            ranks.close()

    expected = logits_of(load_model(folder, dtype="float32", device=CPU))
    with ThreadPoolExecutor(size) as threads:
        for found in threads.map(run, all_ranks, parts):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return parts[-1]


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
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("architecture", RUN)
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
