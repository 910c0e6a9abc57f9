"""Find the retrieval head of a model: its own directory, or a draft that is known to fit."""

from __future__ import annotations

from pathlib import Path

from specontext.core import ModelShape
from specontext.retrieval.checkpoint import OWN_HEAD, load_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadError

# Public EAGLE-3 drafts by the model that they were distilled from; a head is pruned from them.
KNOWN_DRAFTS = {
    "meta-llama/Llama-3.1-8B-Instruct": "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
    "meta-llama/Llama-3.3-70B-Instruct": "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B",
    "Qwen/Qwen3-1.7B": "AngelSlim/Qwen3-1.7B_eagle3",
    "Qwen/Qwen3-4B": "AngelSlim/Qwen3-4B_eagle3",
    "Qwen/Qwen3-8B": "AngelSlim/Qwen3-8B_eagle3",
    "Qwen/Qwen3-14B": "AngelSlim/Qwen3-14B_eagle3",
    "Qwen/Qwen3-32B": "AngelSlim/Qwen3-32B_eagle3",
}


def find_head(
    choice: str | Path | None, *, model_name: str, model_path: Path | None, target: ModelShape, need_map: bool = True
) -> RetrievalHead:
    """The retrieval head that `choice` names.

    Args:
        choice: a directory, a Hub id, or 'auto': the checkpoint's own `retrieval_head/`, else the known draft of the model.
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
    if str(choice) != "auto":
        return load_head(choice, target=target, need_map=need_map)
    if model_path is not None and (model_path / OWN_HEAD).is_dir():
        return load_head(model_path / OWN_HEAD, target=target, need_map=need_map)
    if model_name in KNOWN_DRAFTS:
        return load_head(KNOWN_DRAFTS[model_name], target=target, need_map=need_map)
    raise HeadError(
        f"no retrieval head is known for '{model_name}': put one into the checkpoint's {OWN_HEAD}/ directory, name an EAGLE-3 "
        "draft of this model or a head directory with retrieval_head (--retrieval-head), train one with `specontext distill`, "
        "or choose another method, such as full or streaming"
    )
