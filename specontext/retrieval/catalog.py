"""Find the retrieval head of a model: its own directory, one that comes with this package, or a draft that is known to fit."""

from __future__ import annotations

from pathlib import Path

import torch

from specontext.errors import HeadError
from specontext.gguf.source import source_of
from specontext.locations import HEADS
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import CONFIG, OWN_HEAD, load_head, read_config, tensor_name
from specontext.retrieval.head import RetrievalHead

# Public EAGLE-3 drafts by the model that they were distilled from, those first that know the longest contexts; a head is pruned
# from one. Where the names stand: TanBaby's (trained further at 32,768 tokens with YaRN) in the README of
# github.com/TanZhendong/SpecPV, AngelSlim's in that of Tencent/AngelSlim, RedHatAI's in that of vllm-project/speculators, lmsys's
# in sgl-project/SpecForge (community_resources/specbundle.md); yuhuili's are those of EAGLE's authors, which vLLM's tests use.
# EAGLE 3.1 has none here: its public drafts (lightseekorg/kimi-k2.6-eagle3.1-mla, nvidia/gpt-oss-120b-Eagle3-v3) are of models
# whose attention this engine does not compute.
KNOWN_DRAFTS: dict[str, tuple[str, ...]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (
        "TanBaby/EAGLE3-LLaMA3.1-Instruct-8B-YARN-64K",
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        "lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge",
        "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
    ),
    "meta-llama/Llama-3.3-70B-Instruct": (
        "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B",
        "lmsys/SGLang-EAGLE3-Llama-3.3-70B-Instruct-SpecForge",
        "RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3",
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B",),
    "Qwen/Qwen3-1.7B": ("AngelSlim/Qwen3-1.7B_eagle3",),
    "Qwen/Qwen3-4B": ("TanBaby/EAGLE3-Qwen3-4B-YARN-64K", "AngelSlim/Qwen3-4B_eagle3"),
    "Qwen/Qwen3-8B": (
        "TanBaby/EAGLE3-Qwen3-8B-YARN-64K",
        "AngelSlim/Qwen3-8B_eagle3",
        "RedHatAI/Qwen3-8B-speculator.eagle3",
    ),
    "Qwen/Qwen3-14B": (
        "TanBaby/EAGLE3-Qwen3-14B-YARN-64K",
        "AngelSlim/Qwen3-14B_eagle3",
        "RedHatAI/Qwen3-14B-speculator.eagle3",
    ),
    "Qwen/Qwen3-32B": ("AngelSlim/Qwen3-32B_eagle3", "RedHatAI/Qwen3-32B-speculator.eagle3"),
}


# How the model of a head that comes with this package is called elsewhere: the last part of its Hub id, which copies and GGUF
# files of it have in their names, and the name in the metadata of its GGUF files.
KNOWN_AS = {"smollm2": ("smollm2-135m-instruct", "smollm2 135m 8k lc100k mix1 ep2")}


def bundled_head(model_name: str, model_path: Path | None, target: ModelShape) -> Path | None:
    """The directory of the head that comes with this package for a model, whether it is there or not; None for other models.

    Args:
        model_path: directory of the model's checkpoint: one that was converted, or a copy of the Hub's, is known by its name.
    """
    if model_name in HEADS:
        return HEADS[model_name]
    made_from = source_of(model_path)
    names = {Path(model_name).name, *(model_path.parts if model_path is not None else ())}
    names |= {str(made_from.get("file", "")), str(made_from.get("name", ""))}
    for name, folder in HEADS.items():
        if any(known in said.lower() for known in KNOWN_AS[name] for said in names) and _fits(folder, target):
            return folder
    return None


def _fits(folder: Path, target: ModelShape) -> bool:
    """Whether a head is there and was made for a model of this shape: a name alone may belong to another model."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        read_config(folder).check_target(target, need_map=False)
    except HeadError:
        return False
    return True


def find_head(
    choice: str | Path | None, *, model_name: str, model_path: Path | None, target: ModelShape, need_map: bool = True
) -> RetrievalHead:
    """The retrieval head that `choice` names.

    Args:
        choice: a directory, a Hub id, or 'auto': the checkpoint's own `retrieval_head/`, else the one that comes with this
            package for the model, else the first known draft of the model.
        model_path: directory of the model's checkpoint, None for a Hub id.
        need_map: whether a head with other groups than the model's KV heads needs a head map: not where all heads read one set.

    Raises:
        HeadError: there is none, or it does not fit; the message names the ways to get one.
    """
    if choice is None:
        raise HeadError(
            "the method 'speculative' needs a retrieval head: name one with retrieval_head (--retrieval-head), "
            "or choose another method, such as full or streaming"
        )
    source = choice if str(choice) != "auto" else _known_head(model_name, model_path, target)
    head = load_head(source, target=target, need_map=need_map)
    most = torch.finfo(target.dtype).max
    if large := [name for name, tensor in head.state_dict().items() if tensor.abs().amax() > most]:
        raise HeadError(
            f"{tensor_name(large[0])} of the retrieval head in {source} holds values beyond {most:g}, the most that the model's "
            f"number format has ({str(target.dtype).removeprefix('torch.')}): run the model in bfloat16 or float32"
        )
    return head


def _known_head(model_name: str, model_path: Path | None, target: ModelShape) -> str | Path:
    """Where the head of a model is that nobody named; raises HeadError where none is known."""
    if model_path is not None and (model_path / OWN_HEAD).is_dir():
        return model_path / OWN_HEAD
    if model_name in HEADS:
        return model_name
    if (bundled := bundled_head(model_name, model_path, target)) is not None:
        return bundled
    if model_name in KNOWN_DRAFTS:
        return KNOWN_DRAFTS[model_name][0]
    raise HeadError(
        f"no retrieval head is known for '{model_name}': put one into the checkpoint's {OWN_HEAD}/ directory, name an EAGLE-3 "
        "draft of this model or a head directory with retrieval_head (--retrieval-head), train one with `specontext distill`, "
        "or choose another method, such as full or streaming"
    )
