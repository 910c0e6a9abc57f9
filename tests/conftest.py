"""Tiny random checkpoints of five kinds, each with a retrieval head of its own kind, and helpers to run them.

Weights are wide (`initializer_range` 0.2) and norms and biases random: with the defaults attention is nearly uniform and
hides errors.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start: every core has a test of its own
if not torch.cuda.is_available():  # kernels run in Triton's interpreter; to be said before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma2Config,
    Gemma4TextConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)
from transformers import logging as transformers_logging
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import specontext.models
from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.engine import rank_processes
from specontext.models.decoder import decoder_of
from specontext.models.latents import EXPAND
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.head_map import band_map
from tests.forked import RANKS

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from tests.interpreter import make_it_quick

    make_it_quick()


def path_with(root: Path) -> dict[str, str]:
    """For the environment of a process that is to import what lies in `root`, and the rest from where these tests do."""
    return {"PYTHONPATH": os.pathsep.join((str(root), *filter(None, [os.environ.get("PYTHONPATH")])))}


gc.disable()  # while tests are collected: what imports make stays


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """A million objects of libraries are not looked through again and again while tests run."""
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One process where a GPU is shared by all; elsewhere one for each core, as is the default (None)."""
    return 1 if torch.cuda.is_available() else None


NANO = Path(specontext.models.__file__).parent / "nano"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")  # architectures; 'bands' is one more checkpoint
MAX_POSITION = 512
LATENT: dict[str, Any] = {
    **{"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
        **{"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1},
    },
}
ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
    "first_k_dense_replace": 1,
}

Prompts = list[list[int]]
MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(NANO)


def need_latents() -> None:
    """Skips a test where transformers' classes with multi-head latent attention do not hand out latents."""
    if not hasattr(DeepseekV3Attention, EXPAND):
        pytest.skip("this version of transformers does not hand out latents")


def family_config(family: str, vocab_size: int, **changes: Any) -> PreTrainedConfig:
    """A tiny config; head dims differ from hidden / heads, and GQA ratios are 2, 1, 3, 4 and 2.

    A token of 'bands', a Llama with three KV heads, takes as many bytes as one of 'llama'. Of the five layers of 'windows' (a
    Gemma 2, with a soft cap), 'sinks' (a gpt-oss) and 'chunks' (a Llama 4) three attend to the whole context, and
    so do those of 'delta' (a Qwen3-Next) and 'conv' (an LFM2); the others keep a state. 'latents' is a
    DeepSeek-V3 with a dense layer, then experts in two groups, and YaRN that changes the scale. Of the eight layers of 'shared'
    (a Gemma 4) the last three read the KV of layers 3, 4 and 4; of the others two have a window.
    """
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": MAX_POSITION,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    if family == "llama":
        own = LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    elif family == "bands":
        own = LlamaConfig, {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    elif family == "qwen2":
        own = Qwen2Config, {"num_attention_heads": 4, "num_key_value_heads": 4}
    elif family == "qwen3":
        own = Qwen3Config, {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20}
    elif family in ("windows", "sinks", "chunks"):
        near, sizes = "sliding_attention", {"num_hidden_layers": 5, "head_dim": 16, "num_attention_heads": 4}
        if family == "windows":
            own = Gemma2Config, {"num_key_value_heads": 2, "sliding_window": 10, "attn_logit_softcapping": 3.0}
        elif family == "sinks":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            own = GptOssConfig, {"num_key_value_heads": 1, "sliding_window": 7, **experts}
        else:
            near, experts = "chunked_attention", {"num_local_experts": 2, "intermediate_size_mlp": 96}
            own = Llama4TextConfig, {"num_key_value_heads": 2, "attention_chunk_size": 12, **experts}
            sizes |= {"no_rope_layers": [1, 0, 1, 0, 0], "floor_scale": 20}
        far = "full_attention"
        own = own[0], own[1] | sizes | {"layer_types": [near, far, near, far, far]}
    elif family in ("delta", "conv"):
        kept, far = {"delta": "linear_attention", "conv": "conv"}[family], "full_attention"
        sizes = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"layer_types": [kept, far, kept, far, far]}
        if family == "delta":
            heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            shared = {"shared_expert_intermediate_size": 32, "head_dim": 16}
            own = Qwen3NextConfig, sizes | heads | experts | shared
        else:
            own = Lfm2Config, sizes | {"block_multiple_of": 8}
    elif family == "shared":
        near, far = "sliding_attention", "full_attention"
        kinds = [near, far, far, near, far, near, far, far]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": 10}
        inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": vocab_size, "use_double_wide_mlp": True}
        own = Gemma4TextConfig, {"num_hidden_layers": 8, "layer_types": kinds, "num_kv_shared_layers": 3, **heads, **inputs}
    elif family == "latents":
        need_latents()
        own = DeepseekV3Config, {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, **LATENT, **ROUTED}
    else:
        own = MistralConfig, {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None}
    return own[0](**(common | own[1] | changes))


def family_head(family: str, vocab_size: int) -> HeadConfig:
    """A head of another kind for each family: plain, the last hidden state among its features, a head map, no features, and one
    for three bands of layers with a single wide key that knows its own token."""
    common: dict[str, Any] = {"hidden_size": 64, "target_hidden_size": 64, "vocab_size": vocab_size, "head_dim": 16}
    if family == "llama":
        return HeadConfig("features", heads=4, kv_heads=2, feature_layers=(0, 1, 2), rope_theta=500.0, **common)
    if family == "bands":
        wide: dict[str, Any] = {"key_heads": 1, "key_inputs": "around", "query_rank": 20, "head_map": band_map(3, 3, 3)}
        sizes = {"hidden_size": 96, "target_hidden_size": 96, "head_dim": 40}
        return HeadConfig("features", heads=18, kv_heads=9, feature_layers=(1, 2), **common | sizes | wide)
    if family == "shared":
        bands = {"heads": 4, "kv_heads": 4, "head_map": ((0, 1), (2, 3), (2, 3))}
        return HeadConfig("features", feature_layers=(1, 6), **common | bands)
    if family == "windows":
        bands: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_map": ((0, 1), (2, 3), (2, 3))}
        return HeadConfig("features", feature_layers=(1, 5), **common | bands)
    if family in ("sinks", "chunks", "delta", "conv"):
        groups = 1 if family == "sinks" else 2
        return HeadConfig("features", heads=2 * groups, kv_heads=groups, feature_layers=(2, 4), **common)
    if family == "latents":
        return HeadConfig("features", heads=8, kv_heads=2, head_map=((0,), (0,), (1,), (1,)), feature_layers=(1, 4), **common)
    if family == "qwen2":
        return HeadConfig("features", heads=8, kv_heads=4, feature_layers=(3, 1), **common)
    if family == "qwen3":
        swapped = ((2, 0), (1, 1), (0, 2))
        return HeadConfig("features", heads=6, kv_heads=3, feature_layers=(1,), head_map=swapped, qk_norm=True, **common)
    return HeadConfig("embedding", heads=2, kv_heads=1, **common)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights everywhere: norms around one, the rest around zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)


def write_checkpoint(folder: Path, config: PreTrainedConfig, head: HeadConfig | None, tokenizer: Any) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if head is not None:
        module = RetrievalHead(head)
        randomise(module, seed=2)
        save_head(module, folder / "retrieval_head")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """The checkpoint directory of a family, written when it is first asked for; tests must not change it."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            config, head = family_config(family, len(tokenizer)), family_head(family, len(tokenizer))
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family), config, head, tokenizer)
        return made[family]

    return folder_of


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes that a test starts can be interrupted, also where the tests were started with SIGINT ignored, as many CI systems
    and shells do with what runs in the background: a child inherits that, and Python then leaves it alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def larger_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nano` as fine-tuning leaves a model whose embedding was not resized: the tokenizer knows '<|new|>', the model does not."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    shutil.copytree(NANO, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_family(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """write_family(family, **changes of the config): a fresh checkpoint without a retrieval head."""

    def write(family: str, **changes: Any) -> Path:
        return write_checkpoint(tmp_path / family, family_config(family, len(tokenizer), **changes), None, tokenizer)

    return write


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The unmodified Hugging Face model of a family, with eager attention."""
    loaded: dict[str, PreTrainedModel] = {}

    def model_of(family: str) -> PreTrainedModel:
        if family not in loaded:
            model = AutoModelForCausalLM.from_pretrained(checkpoint(family), attn_implementation="eager", dtype=torch.float32)
            loaded[family] = model.eval().requires_grad_(False)
        return loaded[family]

    return model_of


@pytest.fixture(scope="session")
def make_llm(checkpoint: Callable[[str], Path]) -> MakeLLM:
    """make_llm(family, method, budget=..., ..., max_num_seqs=..., ...): settings of both configs by name."""
    settings = set(SpeContextConfig.__dataclass_fields__)

    def make(family: str = "llama", method: str = "speculative", **options: Any) -> LLM:
        chosen = {"sink": 2, "recent": 4} | {name: options.pop(name) for name in settings & set(options)}
        return LLM(checkpoint(family), config=SpeContextConfig(method=method, **chosen), **{"device": "cpu"} | options)

    return make


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> Prompts:
    """Random token ids of four lengths, one shorter than sink + recent."""
    rng = random.Random(0)
    return [[rng.randrange(4, len(tokenizer)) for _ in range(length)] for length in (5, 47, 83, 30)]


@pytest.fixture(scope="session")
def greedy() -> Callable[..., SamplingParams]:
    def params(max_tokens: int = 24, **options: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | options, max_tokens=max_tokens)

    return params


@pytest.fixture(scope="session")
def expected(reference: Callable[[str], PreTrainedModel], prompts: Prompts) -> Callable[..., list[list[int]]]:
    """What Hugging Face's `generate` writes greedily after each prompt, one prompt at a time."""
    known: dict[tuple[str, int], list[list[int]]] = {}

    def tokens_of(family: str, max_tokens: int = 24) -> list[list[int]]:
        if (family, max_tokens) not in known:
            model = reference(family)
            outputs = [
                model.generate(
                    torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=1
                )[0, len(prompt) :].tolist()
                for prompt in prompts
            ]
            known[family, max_tokens] = outputs
        return known[family, max_tokens]

    return tokens_of


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a test starts are forked from a process that has imported everything."""
    monkeypatch.setattr(rank_processes, "subprocess", RANKS)


Masks = list[torch.Tensor]


@pytest.fixture(scope="session")
def masked_forward() -> Callable[..., Any]:
    """masked_forward(model, ids, masks): an eager Hugging Face forward in which layer i's heads see what masks[i] allows, if any.

    masks[i] is bool [Hq, S, S]. Besides Hugging Face's own outputs, the result has `inputs`: what entered each decoder layer
    and, at last, the final norm, each [S, H].
    """

    def run(model: PreTrainedModel, ids: list[int], masks: Masks, *, attentions: bool = False) -> Any:
        inputs: list[torch.Tensor] = []
        handles = []
        decoder: Any = decoder_of(model)
        for layer, mask in zip(decoder.layers, masks, strict=True):
            bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None]

            def put_mask(_: Any, args: Any, kwargs: Any, bias: torch.Tensor = bias) -> Any:
                return args, kwargs | {"attention_mask": bias}

            if hasattr(layer, "self_attn"):
                handles.append(layer.self_attn.register_forward_pre_hook(put_mask, with_kwargs=True))
        for module in [*decoder.layers, decoder.norm if hasattr(decoder, "norm") else decoder.embedding_norm]:
            handles.append(module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])))
        try:
            output = model(torch.tensor([ids]), output_attentions=attentions, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        output.inputs = inputs
        return output

    return run
