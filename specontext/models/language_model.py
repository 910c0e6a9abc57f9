"""The language model of a checkpoint that also reads images or sounds: its decoder alone is loaded, its tensors found by name.

Its config is the checkpoint's `text_config` (see `specontext.locations.read_config`). Where the library has a class with an
output layer for it, that class is used; else one is put on its decoder here, as the library's class for all modalities does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from specontext.checkpoints.weights import StoredTensor
from specontext.errors import ModelError

# Names of a language model's tensors among those of other modalities, old and new, and what they are called by themselves.
NAMES = {r"^(model\.)?language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."}
# Parts of such checkpoints that no text goes through.
OTHERS = re.compile(
    r"^(model\.)?(vision|visual|image|audio|speech|video|multi_?modal|mm_|embed_vision|embed_audio|connector|projector|vit|aligner"
    r"|patch|resampler|perceiver|qformer|query_tokens|language_projection|talker|token2wav|code2wav)"
)


def is_other_modality(name: str) -> bool:
    """Whether a tensor of such a checkpoint belongs to what reads images or sounds."""
    return OTHERS.match(name) is not None


def decoder_name(name: str) -> str:
    """What a tensor of such a checkpoint is called in its language model by itself."""
    for pattern, own in NAMES.items():
        name = re.sub(pattern, own, name)
    return name


def of_decoder(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of such a checkpoint that belong to its language model, by their names in it."""
    return {decoder_name(name): replace(one, key=name) for name, one in stored.items() if not is_other_modality(name)}


def made_model(config: PreTrainedConfig, options: Mapping[str, Any], **further: Any) -> PreTrainedModel:
    """The decoder of a config, with whatever its weights are when they are made.

    Args:
        options: `trust_remote_code`.
    """
    kind = causal_class(config)
    if kind is AutoModelForCausalLM:
        made: PreTrainedModel = kind.from_config(config, trust_remote_code=options["trust_remote_code"], **further)
    else:
        made = kind._from_config(config, **further)
    return made


def causal_class(config: PreTrainedConfig) -> Any:
    """The class that makes or loads the decoder of a config, with its output layer.

    Raises:
        ModelError: the library has no decoder for it.
    """
    kind = type(config)
    if kind in AutoModelForCausalLM._model_mapping or kind not in AutoModel._model_mapping:
        return AutoModelForCausalLM
    made: Any = _with_output_layer
    return made(kind)


@cache
def _with_output_layer(kind: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    decoder: Any = AutoModel._model_mapping[kind]
    if not hasattr(decoder, "get_input_embeddings"):
        raise ModelError(f"{kind.__name__} is not supported: transformers has no decoder for it")

    class LanguageModel(PreTrainedModel, GenerationMixin):
        """A decoder with an output layer."""

        config_class = kind
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (not the instance's, for the library)
        _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, logits_to_keep: int | Tensor = 0, **options: Any) -> CausalLMOutputWithPast:
            states = self.model(input_ids=input_ids, **options).last_hidden_state
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return CausalLMOutputWithPast(logits=self.lm_head(states[:, kept]))

    for name in dir(decoder):
        if name.startswith("_supports") or name == "_no_split_modules":
            setattr(LanguageModel, name, getattr(decoder, name))
    LanguageModel.__name__ = decoder.__name__
    return LanguageModel
