"""Architectures beyond those of the other tests: Hugging Face's tokens exactly, also with a head, or a refusal that says why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import specontext
from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.distill.target import Target
from specontext.errors import ModelError
from specontext.models.decoder import decoder_layers, decoder_of
from specontext.models.loading import load_model
from tests.models.architectures import RUN, SELDOM
from tests.models.conftest import Write, write_architecture

ALL = [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in RUN]
SOME = [
    name if name in ("DeepseekV2", "GPT2", "Lfm2", "OPT", "Qwen3Moe", "StableLm") else pytest.param(name, marks=pytest.mark.slow)
    for name in RUN
]
# States beside windows: no public checkpoint stands in the table.
BOTH: dict[str, dict[str, Any]] = {
    "LaraMini": {"layer_types": ["linear_attention", "full_attention", "sliding_attention"], "sliding_window": 24},
    "Lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"], "sliding_window": 24}
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1},
}
TOKENS = [*ALL, *(pytest.param(name, marks=pytest.mark.slow) for name in BOTH)]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Bloom": ({}, "BloomForCausalLM is not supported: its layers have attention of their own"),
    "Doge": ({}, "DogeForCausalLM is not supported: it hands its attention a mask of its own"),
    "Falcon": ({}, "its attention cannot be exchanged"),
    "Mamba2": (
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
        r"none of its layers has attention \(layer_types\), so there is nothing to select from",
    ),
    "MiniMax": (
        {"layer_types": ["linear_attention", "full_attention", "full_attention"], "head_dim": 16},
        "MiniMaxForCausalLM is not supported: .* cache of its own",
    ),
    "Zamba": (
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "attention_head_dim": 32, "mamba_dt_rank": 8, "n_mamba_heads": 2},
            "use_mamba_kernels": False,
        },
        "several of its layers share one attention",
    ),
    "Zamba2": (
        {"layers_block_type": ["mamba", "hybrid", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 16, "num_mem_blocks": 1},
        "several of its layers share one attention",
    ),
    "Lfm3": (
        {"layer_types": ["conv", "sliding_attention", "conv"], "sliding_window": 24},
        "all of its layers with attention have a window",
    ),
    "GPTNeoX": (
        {"num_key_value_heads": 2},
        "layer 0 has keys of 4 heads with 16 dimensions, the config says 2 heads with 16 dimensions",
    ),
}


MADE = 8  # tokens after a prompt


@dataclass(frozen=True)
class Written:
    """A checkpoint that tests of an architecture share, with a random head in it.

    Attributes:
        model: Hugging Face's, as it is stored.
        right: what that writes greedily after `prompts[1:3]`.
    """

    folder: Path
    model: PreTrainedModel
    right: list[list[int]]


def right_tokens(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Hugging Face's greedy continuations."""
    made = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=MADE, do_sample=False, eos_token_id=None, pad_token_id=1)
        made.append(output[0, len(prompt) :].tolist())
    return made


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MADE, ignore_eos=True))
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, prompts: list[list[int]]
) -> Written:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_architecture(folder, tokenizer, request.param, (RUN | BOTH)[request.param])
    return Written(folder, model, right_tokens(model, prompts[1:3]))


@pytest.mark.parametrize("written", TOKENS, indirect=True)
def test_tokens_are_hugging_face_s(written: Written, prompts: list[list[int]]) -> None:
    llm = LLM(written.folder, config=SpeContextConfig(method="oracle", budget=512, offload_layers=1), device="cpu")
    assert tokens_of(llm, prompts[1:3]) == written.right
    llm.reconfigure(SpeContextConfig(budget=512, offload_layers=-1))
    assert tokens_of(llm, prompts[1:3]) == written.right, "with a head that leaves nothing out"
    llm.reconfigure(SpeContextConfig(budget=24, sink=2, recent=4, offload_layers=-1))
    (output,) = llm.generate(prompts[2:3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=0))
    assert output.stats["tokens_read_per_step"] == 24
    scores = written.model(torch.tensor(prompts[2:3])).logits[0].log_softmax(-1)
    wanted = [scores[at, token].item() for at, token in enumerate(prompts[2][1:])]
    found = [entry[token] for token, entry in zip(prompts[2][1:], output.prompt_logprobs[1:], strict=True)]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("written", SOME, indirect=True)
def test_so_are_those_of_its_own_generate(written: Written, prompts: list[list[int]]) -> None:
    model, head = written.model, written.folder / "retrieval_head"
    everything, some = (SpeContextConfig(budget=budget, sink=2, recent=4, offload_layers=-1) for budget in (512, 12))
    try:
        specontext.enable(model, head, everything)
        assert right_tokens(model, prompts[1:3]) == written.right
        enabled = specontext.enable(model, head, some)
        assert right_tokens(model, prompts[2:3])
        [stats] = enabled.statistics
        assert stats is not None and stats["tokens_read_per_step"] == 12
    finally:
        specontext.disable(model)
    assert right_tokens(model, prompts[1:2]) == written.right[:1]


@pytest.mark.parametrize("written", SOME, indirect=True)
def test_in_16_bits_it_is_neither_refused_nor_left_without_parts_to_compile(written: Written) -> None:
    llm = LLM(written.folder, config=SpeContextConfig(budget=24), device="cpu", dtype="bfloat16", max_model_len=64)
    (output,) = llm.generate([list(range(4, 40))], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3


@pytest.mark.parametrize("written", SOME, indirect=True)
@torch.no_grad()
def test_a_teacher_shows_hugging_face_s_states(written: Written) -> None:
    model, ids = written.model, torch.arange(4, 44)[None]
    loaded = load_model(written.folder, dtype="auto", device=torch.device("cpu"))
    depth = loaded.shape.depth
    seen = Target(loaded.model, (1, 2, depth)).observe(ids)
    right = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    active = getattr(model.config, "altup_active_idx", 0)  # of several states of a token

    def state(found: torch.Tensor) -> torch.Tensor:
        return (found[active] if found.dim() == 4 else found)[0]

    final = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    for layer, found in enumerate(seen.features.unflatten(-1, (3, -1))[0].unbind(1)[:2], start=1):
        torch.testing.assert_close(found, state(right[layer]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.hidden, final, atol=1e-4, rtol=1e-4)  # after the final norm
    last = seen.features[0, :, 2 * 64 :]  # before it
    assert not torch.allclose(last, final[0], atol=1e-2)
    caught: list[torch.Tensor] = []
    decoder_layers(model)[-1].register_forward_hook(
        lambda *call: caught.append(call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    model(ids)
    torch.testing.assert_close(last, state(caught[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_the_engine_cannot_run_is_refused_when_it_is_loaded(architecture: str, write: Write, tmp_path: Path) -> None:
    changes, why = REFUSED[architecture]
    write(architecture, changes)
    with pytest.raises(ModelError, match=why):
        LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")


def test_layers_without_attention_are_refused(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("SmolLM3", {})
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

    forward = SmolLM3DecoderLayer.forward

    def skipping(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.self_attn.layer_idx == 1 else forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SmolLM3DecoderLayer, "forward", skipping)
    with pytest.raises(ModelError, match="of its 3 layers these have ordinary attention: 0, 2"):
        LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")


def test_models_of_one_process_do_not_disturb_each_other(write: Write, tmp_path: Path, prompts: list[list[int]]) -> None:
    model = write("StableLm", {})
    one, two = (load_model(tmp_path, dtype="auto", device=torch.device("cpu")) for _ in range(2))
    config = SpeContextConfig(method="full")
    first, second = LLM(one, None, config), LLM(two, None, config)
    right = right_tokens(model, prompts[1:2])
    assert all(tokens_of(llm, prompts[1:2]) == right for llm in (first, second, first))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    "architecture",
    ["DeepseekV2", "Gemma3nText", "Gemma4Text", "GPT2", "HunYuanDenseV1", "Olmo2", "Phi3", "Qwen3_5MoeText", "StableLm"],
)
def test_two_ranks(architecture: str, write: Write, tmp_path: Path) -> None:
    """Latents, KV of earlier layers, other heads where there is a window, feed-forward layers that no plan names, norms over all
    heads, queries, keys and values in one matrix, states, code that counts heads."""
    write(architecture, RUN[architecture])
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
    options["config"] = SpeContextConfig(budget=20, sink=2, recent=4, offload_layers=1)
    prompt = [[*range(4, 80)]]
    expected = tokens_of(LLM(tmp_path, **options), prompt)
    llm = LLM(tmp_path, tensor_parallel_size=2, **options)
    try:
        assert tokens_of(llm, prompt) == expected
    finally:
        llm.engine.close()
