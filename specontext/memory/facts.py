"""What a memory plan must know of a model and of its retrieval head; no weights are read for it.

`weight_bytes` and `kv_bytes_per_token` are the numbers that planner, benchmarks and logs share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from specontext.config_entries import of_layers
from specontext.errors import ConfigError, ModelError
from specontext.locations import one_sentence, part_of
from specontext.memory.layer_blocks import LayerBlocks, divide_layers
from specontext.model_shape import ModelShape

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need them
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class HeadFacts:
    """Size of a retrieval head.

    Attributes:
        parameters: numbers in its projections and norms, and in its embedding table where it does not use the model's.
        lookup_parameters: those of them in that table, of which a step reads a row for each token.
        head_map: the group that each KV head of each layer reads; None where each reads its own number.
        heads, kv_heads, key_heads, head_dim: its own query heads, groups, keys of each token, and width.
        feature_width: numbers of the features that it reads of each token; 0 for an embedding-only head.
        state_width: numbers that it keeps of each request's last token; 0 for an embedding-only head.
        recommended_budget: what its config recommends, None if nothing.
        source: where these facts come from, in words.
    """

    parameters: int
    heads: int
    kv_heads: int
    key_heads: int
    head_dim: int
    feature_width: int
    state_width: int
    recommended_budget: int | None = None
    source: str = ""
    lookup_parameters: int = 0
    head_map: tuple[tuple[int, ...], ...] | None = None


NO_HEAD = HeadFacts(parameters=0, heads=0, kv_heads=0, key_heads=0, head_dim=0, feature_width=0, state_width=0)


@dataclass(frozen=True)
class ModelFacts:
    """Size of a decoder.

    Attributes:
        parameters: all of them, a table that embedding and output share counted once.
        lookup_parameters: those of them that a decode step does not read: tables of embeddings that are nothing else, of which
            it reads a row for each request.
        intermediate_size: width of the feed-forward layers.
        weights_note: what was done to the weights, such as 'dequantised from Q4_1'; None where they are the checkpoint's own.
        stored_bytes: bytes of the weights where some are quantised; None where all are in the shape's number format.
        whole_parameters: those of `whole_modules`, which every rank has.
        tied: whether embedding and output share one table.
    """

    name: str
    shape: ModelShape
    parameters: int
    lookup_parameters: int
    intermediate_size: int
    head: HeadFacts
    weights_note: str | None = None
    stored_bytes: int | None = None
    whole_parameters: int = 0
    tied: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are loaded."""
        return weight_bytes(self.parameters, self.shape.dtype) if self.stored_bytes is None else self.stored_bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of weights and head that a decode step reads: of tables of embeddings, of which it reads some rows, none."""
        tables = self.lookup_parameters + self.head.lookup_parameters
        return self.weight_bytes + self.head_bytes - weight_bytes(tables, self.shape.dtype)

    @property
    def head_bytes(self) -> int:
        """Bytes of the retrieval head, which is loaded in the model's number format."""
        return weight_bytes(self.head.parameters, self.shape.dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers and KV heads."""
        return self.shape.kv_bytes_per_token

    @cached_property
    def layer_blocks(self) -> LayerBlocks:
        """The layers whose rows lie side by side on the host."""
        return divide_layers(self.head_map, self.shape.on_host.row_bytes)

    @property
    def head_map(self) -> tuple[tuple[int, ...], ...]:
        """The group that each KV head of each layer reads: its own number where the head says nothing."""
        groups = self.head.head_map
        if groups is None or len(groups) != self.shape.layers:  # no engine takes the head of another model
            return (tuple(range(self.shape.kv_heads)),) * self.shape.layers
        return groups

    @property
    def key_bytes_per_token(self) -> int:
        """Bytes of the retrieval head's keys of one token."""
        return self.head.key_heads * self.head.head_dim * self.shape.dtype.itemsize

    def tokens_of_key_page(self, page_size: int) -> int:
        """Tokens whose head keys lie in a page that holds K and V of `page_size` tokens of a layer; 0 without a head.

        Raises:
            ConfigError: none has room in it.
        """
        token, key = self.shape.kv_heads * self.shape.row_bytes, self.key_bytes_per_token
        if key > page_size * token:
            raise ConfigError(
                f"a page of {page_size} tokens has {page_size * token} bytes, and the retrieval head's keys of one token take "
                f"{key}: set page_size to {-(-key // token)} or more"
            )
        return page_size * token // key if key else 0


def weight_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Bytes of so many parameters in a number format."""
    return parameters * dtype.itemsize


def eagle3_head(shape: ModelShape) -> HeadFacts:
    """The head that is pruned from an EAGLE-3 draft whose layer has the model's own width and heads.

    Query and key projections of [embedding, fused features], two norms, and the fusion of three feature layers:
    2H (Hq + Hkv) D + 2H + 3H^2 parameters for hidden size H.
    """
    width, heads = shape.hidden_size, shape.query_heads + shape.kv_heads
    return HeadFacts(
        parameters=2 * width * heads * shape.key_dim + 2 * width + 3 * width * width,
        heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        key_heads=shape.kv_heads,
        head_dim=shape.key_dim,
        feature_width=3 * width,
        state_width=width,
        source="size of a head pruned from an EAGLE-3 draft of this model",
    )


def bare_model(config: PreTrainedConfig, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A decoder of modules without memory; of one taken out of several models the decoder alone, without its output layer.

    Raises:
        ModelError: transformers has no decoder for this config.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({} if dtype is None else {"dtype": dtype})
    with one_sentence("cannot build a decoder from this config"), torch.device("meta"):
        alone = part_of(config) and type(config) not in AutoModelForCausalLM._model_mapping
        model: PreTrainedModel = (AutoModel if alone else AutoModelForCausalLM).from_config(config, **options)
    return model


def count_parameters(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> tuple[int, int]:
    """`parameters` and `lookup_parameters` of `ModelFacts`, from modules without memory.

    Args:
        model: what `bare_model` makes of the config, where it is there already.

    Raises:
        ModelError: transformers has no decoder for this config.
    """
    bare: Any = model or bare_model(config)
    table, output = bare.get_input_embeddings(), bare.get_output_embeddings()
    if output is None:
        own = 0 if config.tie_word_embeddings else table.weight.numel()  # of the output layer
        return sum(p.numel() for p in bare.parameters()) + own, own + other_tables(bare)
    bare.tie_weights()
    tied = output.weight is table.weight
    return sum(p.numel() for p in bare.parameters()), (0 if tied else table.weight.numel()) + other_tables(bare)


def other_tables(model: PreTrainedModel) -> int:
    """Numbers of a decoder's tables of embeddings beside that of its tokens: of positions, of what single layers get."""
    from torch import nn

    tokens = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return sum(table.weight.numel() for table in tables)


def facts_of_config(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    head: HeadFacts | None = None,
    trust_remote_code: bool = False,
) -> ModelFacts:
    """Facts of a model that has a Hugging Face config.

    Args:
        dtype: None takes the config's own.
        head: None supposes the head of an EAGLE-3 draft.
        trust_remote_code: let code that comes with the config make the decoder.

    Raises:
        ModelError: not a decoder with KV heads.
    """
    try:
        shape = ModelShape.from_config(config, dtype)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        kind = type(config).__name__
        raise ModelError(f"{kind} does not describe a decoder with KV heads, so there is no KV to plan: {error}") from error
    check_heads(shape, of_layers(config, "num_key_value_heads", shape.full or range(shape.depth)))
    from specontext.memory.states import measured_states
    from specontext.memory.whole_modules import whole_modules

    model = bare_model(config, shape.dtype, trust_remote_code=trust_remote_code)
    with one_sentence("cannot tell how large the states of its layers are"):
        shape = replace(shape, states=measured_states(model))
    parameters, lookup = count_parameters(config, model)
    tables = {id(table): table.numel() for module in whole_modules(model) for table in module.parameters()}
    width = feed_forward_width(config, shape)
    facts = ModelFacts(name, shape, parameters, lookup, width, head or eagle3_head(shape))
    return replace(facts, whole_parameters=sum(tables.values()), tied=lookup == other_tables(model))


def feed_forward_width(config: PreTrainedConfig, shape: ModelShape) -> int:
    """Numbers between the two products of a feed-forward layer, the most of all layers."""
    stated = getattr(config, "intermediate_size", None) or 4 * shape.hidden_size
    return int(max(stated) if isinstance(stated, list | tuple) else stated)


def check_heads(shape: ModelShape, kv_heads: int | None = None) -> None:
    """Raises ModelError for numbers that no attention has.

    Args:
        kv_heads: what the config says; None where it says nothing, which means one for each query head.
    """
    if kv_heads is not None and kv_heads < 1:
        raise ModelError(f"the model has {kv_heads} KV heads, so there is no KV to plan: num_key_value_heads must be at least 1")
    wrong = [n for n in ("layers", "hidden_size", "query_heads", "head_dim", "max_position") if getattr(shape, n) < 1]
    if wrong:
        raise ModelError(f"the model's config is broken: {wrong[0]} is {getattr(shape, wrong[0])}")
    if shape.query_heads % shape.kv_heads:
        raise ModelError(f"the model's config is broken: {shape.query_heads} query heads over {shape.kv_heads} KV heads")
