"""Whole EAGLE-3 drafts, pruned to a retrieval head while they are read.

Drafts come in dialects. EAGLE, SpecForge and AngelSlim name the layer `midlayer` and count feature layers by their *outputs*
(SpecPV is SpecForge with a YaRN of its own);
speculators names it `layers.0`, nests the layer's config and counts by *inputs* (Hugging Face's `hidden_states` index, ours).
Only the tensors that queries and keys need are read; the others are counted. An embedding table is needed where the draft is of
another width than its target; one of the target's own width is the target's, which EAGLE-3 trains with as it is.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specontext.checkpoints.config_values import check_entries
from specontext.checkpoints.files import check_file, missing_shards, read_json
from specontext.checkpoints.quantization import ADVICE, quantization_of
from specontext.checkpoints.weights import SHARDED, SINGLE, what_is_there
from specontext.checkpoints.wording import first_few, in_one_sentence
from specontext.errors import HeadError
from specontext.model_shape import ModelShape
from specontext.retrieval.head_config import HeadConfig, check_share

LAYER = "midlayer."
NEEDED = (
    "fc.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
)
OPTIONAL = ("input_norm.weight", "midlayer.self_attn.q_norm.weight", "midlayer.self_attn.k_norm.weight")
EMBEDDING = "embed_tokens.weight"
NO_PARAMETERS = ("d2t", "t2d", "rotary_emb.inv_freq")  # tables between the vocabularies, and RoPE frequencies


@dataclass(frozen=True)
class Dialect:
    """How a family of drafts is written and was trained.

    Attributes:
        follows_theta: the training code obeyed the RoPE base of the config; else it used 10000 whatever it says.
        follows_scaling: the training code obeyed the RoPE scaling of the config; else there was none.
        counts_inputs: feature layers are counted by their inputs, else by their outputs.
        trained_length: tokens of the training samples where the makers say so, else the shortest that is known.
    """

    name: str
    follows_theta: bool
    follows_scaling: bool
    counts_inputs: bool
    trained_length: int


EAGLE = Dialect("EAGLE", False, False, False, 2048)
SPECFORGE = Dialect("SpecForge", True, True, False, 4096)
# The drafts of SpecPV (github.com/TanZhendong/SpecPV), trained further at 32K tokens with github.com/TanZhendong/SpecForge-Yarn,
# whose YaRN has base 10000 whatever the config says (that for Qwen3-8B says 1,000,000), and an entry that no other has.
SPECPV = Dialect("SpecPV", False, True, False, 32768)
SPECPV_MARK = "finetuned"
ANGELSLIM = Dialect("AngelSlim", False, False, False, 2048)
SPECULATORS = Dialect("speculators", True, True, True, 2048)
ARCHITECTURES = {"LlamaForCausalLMEagle3": SPECFORGE, "Eagle3LlamaForCausalLM": ANGELSLIM}


def read_draft(folder: Path, values: dict[str, Any], target: ModelShape, *, name: str) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Config and tensors, under EAGLE's names, of the head inside a draft.

    Args:
        values: content of the draft's config.json.
        target: the model that the draft was distilled from; gives what EAGLE's config leaves out.
        name: what the draft is called, for the head's `source`.

    Raises:
        HeadError: not an EAGLE-3 draft, a broken file, or an option that a retrieval head cannot follow.
    """
    dialect = dialect_of(values)
    layer = _object(values, "transformer_layer_config") if dialect is SPECULATORS else values
    check_entries(layer, folder / "config.json", HeadError)
    files = weight_files(folder)
    tensors, shapes = read_weights(files, lambda name: name in NEEDED + OPTIONAL or name.startswith("fc_norm."))
    if missing := [name for name in NEEDED if name not in tensors]:
        raise HeadError(f"{folder} is not an EAGLE-3 draft: it lacks {', '.join(missing)}")
    if refused := unknown_parts(shapes):
        raise HeadError(f"the draft in {folder} has {first_few(refused)}, which a retrieval head does not have")
    required = ("num_attention_heads", "hidden_size", "vocab_size")
    if lacking := [name for name in required if not isinstance(layer.get(name), int)]:
        raise HeadError(f"the config.json of the draft in {folder} lacks '{', '.join(lacking)}'")
    heads, hidden = layer["num_attention_heads"], layer["hidden_size"]
    theta, scaling = _rope(dialect, layer)
    parameters, embedding = count_parameters(shapes)
    feature_layers = _feature_layers(values, dialect, target)
    width = values.get("target_hidden_size") or layer.get("target_hidden_size")
    if width is None:  # where nobody says it, the fusion may tell a draft of another width than its target's
        width = target.hidden_size if shapes["fc.weight"][-1] == target.hidden_size * len(feature_layers) else hidden
    own = hidden != width == target.hidden_size and hidden == len(tensors["midlayer.hidden_norm.weight"])
    if own:
        if not embedding:
            raise HeadError(
                f"the draft in {folder} has width {hidden} and its target {width}, so it needs an embedding table of its own, "
                f"and it has no {EMBEDDING}"
            )
        tensors |= read_weights(files, lambda name: name == EMBEDDING)[0]
    config = HeadConfig(
        variant="features",
        hidden_size=hidden,
        target_hidden_size=width,
        vocab_size=layer["vocab_size"],
        heads=heads,
        kv_heads=layer.get("num_key_value_heads") or heads,
        head_dim=layer.get("head_dim") or tensors["midlayer.self_attn.q_proj.weight"].shape[0] // max(heads, 1),
        feature_layers=feature_layers,
        feature_norm=_feature_norm(tensors),
        rope_theta=theta,
        rope_scaling=scaling,
        trained_length=dialect.trained_length,
        qk_norm="midlayer.self_attn.q_norm.weight" in tensors,
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        source=f"EAGLE-3 draft {name}, {dialect.name} dialect",
        draft_parameters=parameters,
        draft_embedding_parameters=embedding or target.vocab_size * target.hidden_size,
        source_hash=_hash(files),
        own_embedding=own,
    )
    return config, tensors


def dialect_of(values: dict[str, Any]) -> Dialect:
    """The dialect that a draft's config.json is written in.

    Raises:
        HeadError: none of them.
    """
    if kind := values.get("speculators_model_type"):
        if kind != "eagle3":
            raise HeadError(f"this is a speculators draft of type {kind}: retrieval heads are pruned from type eagle3")
        return SPECULATORS
    if "transformer_layer_config" in values:
        return SPECULATORS
    names = values.get("architectures") or ["LlamaForCausalLM"]
    name = str(names[0] if isinstance(names, list) else names)
    if name in ARCHITECTURES:
        known = ARCHITECTURES[name]
        return SPECPV if known is SPECFORGE and SPECPV_MARK in _object(values, "rope_scaling") else known
    if "eagle" in name.lower() or not name.endswith("ForCausalLM"):
        raise HeadError(
            f"unknown dialect of EAGLE-3 drafts: architecture {name}. Known are {', '.join(ARCHITECTURES)}, an ordinary "
            "decoder's name (EAGLE's own drafts) and speculators; if the draft follows one of them, name it in its config.json"
        )
    return EAGLE


def unknown_parts(names: Iterable[str]) -> list[str]:
    """Tensors that belong to a module of the head and that it does not take: biases, scales, zero points."""
    known = {*NEEDED, *OPTIONAL}
    modules = {name.rpartition(".")[0] for name in known} | {"midlayer.self_attn"}
    return sorted(name for name in names if name not in known and name.rpartition(".")[0] in modules)


def count_parameters(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Size of a draft from the shapes of its tensors: without its embedding table, and of that table (0 if it has none).

    What NO_PARAMETERS names is not counted.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(NO_PARAMETERS)}
    embedding = sizes.pop(EMBEDDING, 0)
    return sum(sizes.values()), embedding


def _feature_layers(values: dict[str, Any], dialect: Dialect, target: ModelShape) -> tuple[int, ...]:
    """Indices into `hidden_states`; without a setting, EAGLE's standard 2, L//2, L-3."""
    key = "eagle_aux_hidden_state_layer_ids"
    ids = _object(values, "eagle_config").get(key) or values.get(key)
    if not ids:
        return (2, target.depth // 2, target.depth - 3)
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise HeadError(f"{key} in the draft's config.json must be a list of integers, got {ids!r}")
    return tuple(i if dialect.counts_inputs else i + 1 for i in ids)


def _feature_norm(tensors: Mapping[str, Tensor]) -> str:
    if any(name.startswith("fc_norm.") for name in tensors):
        return "each"
    return "joint" if "input_norm.weight" in tensors else "none"


def _rope(dialect: Dialect, layer: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE base and scaling that the draft was trained with."""
    if not dialect.follows_scaling:
        return 10000.0, None
    check_share(layer)
    rope = _object(layer, "rope_parameters") or _object(layer, "rope_scaling")
    theta = (rope.get("rope_theta") or layer.get("rope_theta") or 10000.0) if dialect.follows_theta else 10000.0
    rope = {name: value for name, value in rope.items() if name != SPECPV_MARK}
    return theta, {"original_max_position_embeddings": layer.get("max_position_embeddings")} | rope if rope else None


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under a key, empty where there is none."""
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise HeadError(f"{key} in the draft's config.json must be an object, got {value!r}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files with a draft's weights: safetensors if there are any, else pytorch_model*.bin.

    Raises:
        HeadError: there are none, or an index names some that are not there.
    """
    for single, index, pattern in zip(SINGLE, SHARDED, ("*.safetensors", "pytorch_model*.bin"), strict=True):
        if (
            not (folder / single).exists()
            and (folder / index).exists()
            and (missing := missing_shards(folder / index, HeadError))
        ):
            raise HeadError(f"the weights in {folder} are incomplete: download {first_few(missing)}, which {index} names")
        if files := sorted(folder.glob(pattern)):
            return files
    raise HeadError(f"no weights in {folder}: expected *.safetensors or pytorch_model.bin{what_is_there(folder)}")


def read_weights(files: Sequence[Path], wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The wanted tensors, and the shapes of all of them, by EAGLE's names.

    Raises:
        HeadError: a broken or truncated file, one that holds anything but tensors, or two that differ in a tensor.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in files:
        check_file(file, HeadError)
        read = _read_safetensors if file.suffix == ".safetensors" else _read_pickle
        found, sizes = read(file, wanted)
        for name in sorted(sizes.keys() & shapes.keys()):
            if sizes[name] != shapes[name] or (name in found and not torch.equal(found[name], tensors[name])):
                raise HeadError(
                    f"{name} is in {places[name].name} and in {file.name} of {file.parent}, and differs: leave one of "
                    "these files there, or download both again"
                )
        places |= dict.fromkeys(sizes, file)
        tensors |= found
        shapes |= sizes
    return tensors, shapes


def _read_safetensors(file: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    try:
        with safe_open(file, framework="pt") as stored:
            names = _common_names(stored.keys(), file)
            tensors = {common: stored.get_tensor(name) for common, name in names.items() if wanted(common)}
            return tensors, {common: tuple(stored.get_slice(name).get_shape()) for common, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{file} is broken or truncated: {in_one_sentence(error)}; download it again") from error


def _read_pickle(file: Path, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle fails in any way
        raise HeadError(f"{file} is broken, or holds more than tensors: {in_one_sentence(error)}") from error
    if not isinstance(stored, dict):
        raise HeadError(f"{file} holds more than tensors: a {type(stored).__name__} at its top")
    if odd := [str(name) for name, value in stored.items() if not isinstance(value, Tensor)]:
        raise HeadError(f"{file} holds more than tensors: {', '.join(odd[:3])}")
    named = {common: stored[name] for common, name in _common_names(stored, file).items()}
    tensors = {name: tensor for name, tensor in named.items() if wanted(name)}
    return tensors, {name: tuple(tensor.shape) for name, tensor in named.items()}


def _common_names(names: Iterable[str], file: Path) -> dict[str, str]:
    """Names of tensors in a file by those in EAGLE's dialect; raises HeadError for two of one tensor."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(common_name(str(name)), name)) != name:
            raise HeadError(f"{file} holds {common_name(str(name))} twice, as {other} and as {name}: it is no draft of one layer")
    return found


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def common_name(name: str) -> str:
    """A tensor's name in EAGLE's dialect."""
    name = name.removeprefix("model.")
    return LAYER + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def config_values(folder: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        HeadError: there is none, it is broken, or it says that the weights are quantised.
    """
    if not folder.is_file() and not (folder / "config.json").exists():
        raise HeadError(f"no retrieval head in {folder}: it has no config.json")
    values = read_json(folder / "config.json", HeadError)
    if found := quantization_of(values, folder, HeadError):
        raise HeadError(f"quantised weights are not supported: {found} of {folder}; {ADVICE}")
    return values
