"""`specontext head`: retrieval heads on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from specontext.cli.analyze import analyze
from specontext.cli.calibrate import calibrate
from specontext.cli.options import OWN_CODE, Settings, with_settings
from specontext.cli.terminal import UsageError, error_console, human_bytes, named_path, quiet_libraries

VARIANTS = ("features", "embedding")
KEYS_READ = {
    ("embedding", "before"): "its embedding",
    ("features", "before"): "its embedding and the features of the token before",
    ("features", "around"): "its embedding, its own features and those of the token before",
}

head_app = typer.Typer(help="Retrieval heads: prune, look at, calibrate, analyze.", no_args_is_help=True, rich_markup_mode=None)
head_app.command()(calibrate)
head_app.command()(analyze)


@head_app.command()
@with_settings(method=(), engine=OWN_CODE)
def prune(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="An EAGLE-3 draft, as directory or Hub id, or a head.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="MODEL", help="Model that it drafts for: checkpoint directory or Hub id.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", parser=named_path, help="Directory for the head.", show_default=False),
    ],
    variant: Annotated[
        str, typer.Option("--variant", help="'features' keeps all that selects, 'embedding' does without the target's features.")
    ] = "features",
    trained_length: Annotated[
        int | None, typer.Option("--trained-length", help="Tokens the draft was trained on. Default: what its makers use.")
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option("--rope-theta", help="RoPE base of the head. Default: what the draft was trained with.")
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Prune a whole draft to the parts that select, and write them as a head directory."""
    if variant not in VARIANTS:
        raise UsageError(f"unknown variant '{variant}': choose one of {', '.join(VARIANTS)}")
    quiet_libraries()
    from specontext.locations import shape_of
    from specontext.retrieval.checkpoint import load_head, save_head

    shape = shape_of(target, **settings.engine)
    head = load_head(source, target=shape, dtype=None, need_map=False)
    if variant == "embedding":
        head = head.embedding_variant()
    elif head.config.variant != variant:
        raise UsageError(f"{source} is a head without features: add --variant embedding")
    changes: dict[str, Any] = {"trained_length": trained_length, "rope_theta": rope_theta}
    head.config = replace(head.config, **{name: value for name, value in changes.items() if value is not None})
    head.set_rope()
    save_head(head, out)
    print(f"{out}: kept {', '.join(name.removesuffix('.weight') for name in head.state_dict())}")
    print(as_text(head_facts(str(out))))
    if head.config.kv_heads != shape.kv_heads and head.config.head_map is None:
        groups = f"it has {head.config.kv_heads} groups and the model {shape.kv_heads} KV heads"
        error_console().print(escape(f"{groups}: run `specontext head calibrate` next"))


@head_app.command()
def info(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A head directory, 'nano', or a model with a head of its own.", show_default=False),
    ],
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="Longest context to say the YaRN factor for, in tokens.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what a retrieval head is made of and what was pruned away for it."""
    if max_model_len is not None and max_model_len < 1:
        raise UsageError(f"--max-model-len must be at least 1, got {max_model_len}")
    quiet_libraries()
    facts = head_facts(source, max_model_len)
    print(json.dumps(facts) if as_json else as_text(facts))


def head_facts(source: str, max_model_len: int | None = None) -> dict[str, Any]:
    """What `info --json` prints.

    Raises:
        HeadError: no head there, or a broken one.
    """
    from specontext.retrieval.checkpoint import read_config, stored_size

    config, (parameters, size) = read_config(source), stored_size(source)
    return {
        "variant": config.variant,
        "parameters": parameters,
        "bytes": size,
        "pruned_share": config.pruned_share(parameters),
        "pruned_share_with_embeddings": config.pruned_share(parameters, with_embeddings=True),
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "yarn": {
            "enabled": config.yarn and config.rope_scaling is None,
            "factor": None if max_model_len is None else config.yarn_factor(max_model_len),
        },
        "trained_length": config.trained_length,
        "feature_layers": list(config.feature_layers),
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "key_heads": config.key_count,
        "key_inputs": config.key_inputs,
        "query_rank": config.query_rank,
        "head_dim": config.head_dim,
        "head_map": config.head_map,
        "source": config.source,
        "source_hash": config.source_hash,
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts in lines."""
    share, with_embeddings = facts["pruned_share"], facts["pruned_share_with_embeddings"]
    yarn, head_map = facts["yarn"], facts["head_map"]
    reach = "off" if not yarn["enabled"] else f"beyond {facts['trained_length']:,} tokens"
    shown = {
        "variant": facts["variant"],
        "parameters": f"{facts['parameters']:,} ({human_bytes(facts['bytes'])})",
        "pruned": "not pruned from a draft"
        if share is None or with_embeddings is None
        else f"{share:.1%} of the draft, {with_embeddings:.1%} with its embedding table",
        "RoPE": f"base {facts['rope_theta']:g}, scaling {facts['rope_scaling'] or 'none'}",
        "YaRN": reach if yarn["factor"] is None else f"{reach}, factor {yarn['factor']:.4g}",
        "trained length": f"{facts['trained_length']:,} tokens",
        "feature layers": ", ".join(map(str, facts["feature_layers"])) or "none",
        "heads": f"{facts['heads']} in {facts['kv_heads']} groups, width {facts['head_dim']}"
        + ("" if facts["query_rank"] is None else f", queries of rank {facts['query_rank']}"),
        "keys": f"{facts['key_heads']} of each token, from {KEYS_READ[facts['variant'], facts['key_inputs']]}",
        "head map": "none, KV head i reads group i" if head_map is None else f"for {len(head_map)} layers",
        "source": facts["source"] or "unknown",
        "source hash": facts["source_hash"] or "none",
    }
    return "\n".join(f"{name:<15} {value}" for name, value in shown.items())
