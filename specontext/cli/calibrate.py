"""`specontext head calibrate`: measure which retrieval group every KV head should read, and write the map into the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specontext.cli.options import OWN_CODE, Settings, with_settings
from specontext.cli.terminal import UsageError, named_path, quiet_libraries

LEAST_BUDGET = 40  # of the default: half of it is chosen, and half are sinks and recent tokens
AUTOMATIC_THETAS = (10000.0, 50000.0, 100000.0, 500000.0, 1000000.0)


@with_settings(method=(), engine=OWN_CODE)
def calibrate(
    head: Annotated[str, typer.Argument(help="Head directory, or an EAGLE-3 draft (then with -o).", show_default=False)],
    *,
    target: Annotated[str, typer.Option("--target", help="The model the head selects for.")],
    text: Annotated[
        list[str],
        typer.Option("--text", metavar="SPEC", help="Text file, directory, .jsonl, .parquet, hf:NAME or tasks; may be repeated."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", parser=named_path, help="Write the head here. Default: where it lies."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", help="KV entries of a selection. Default: 1/8 of the length, at least 40.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens of a sequence. Default: 4096, or the model's maximum.")
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", help="Sequences to measure on.")] = 16,
    theta: Annotated[
        str | None,
        typer.Option("--theta", metavar="auto|X,Y,...", help="Choose the head's RoPE base too, from these or the usual ones."),
    ] = None,
    identity: Annotated[
        bool, typer.Option("--keep-map", help="Measure the map, but leave the head's own in place (to choose theta only).")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Number format of the target's weights.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Seed of sequences and query positions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    settings: Settings,
) -> None:
    """Measure the attention recall of every retrieval group for every KV head of the target, and write the best map.

    The map changes only which group's selection a KV head reads: no further selection, no further transfers.
    """
    quiet_libraries()
    from dataclasses import replace

    from specontext.config import check_seed
    from specontext.distill.calibration import calibrate as measure
    from specontext.distill.data import open_sources
    from specontext.distill.session import sequences_of
    from specontext.distill.target import Target
    from specontext.engine.start import pick_device
    from specontext.errors import SpeContextError
    from specontext.models.loading import load_model
    from specontext.retrieval.checkpoint import check_place, load_head, save_head

    place = out if out is not None else Path(head)
    if out is None and not (place / "config.json").is_file():
        raise UsageError(f"{head} is not a head directory: name where to write the calibrated head with -o DIR")
    if not text:
        raise UsageError("give text to measure on with --text, for example --text corpus.txt or --text tasks")
    if sequences < 1:
        raise UsageError(f"--sequences must be at least 1, got {sequences}")
    check_seed(seed)
    check_place(place)
    where = pick_device(device)
    loaded = load_model(target, dtype=dtype, device=where, **settings.engine)
    found = load_head(head, target=loaded.shape, need_map=False).to(where)
    length = length if length is not None else min(4096, loaded.shape.max_position)
    if length < 2:
        raise UsageError(f"--length must be at least 2, got {length}")
    if length > loaded.shape.reach:
        raise UsageError(f"length {length} exceeds the model's maximum of {loaded.shape.longest}")
    thetas = parse_thetas(theta, found.config.rope_theta)
    if thetas and found.config.rope_scaling is not None:
        raise UsageError("this head has RoPE scaling of its own, which --theta would change: leave out --theta")
    kept = budget if budget is not None else max(length // 8, LEAST_BUDGET)
    if kept >= length:
        raise UsageError(f"a budget of {kept} reads all of {length} tokens, whatever the head chooses: give a longer --length")
    source = open_sources(text, tokenizer=loaded.tokenizer, seed=seed, vocab_size=loaded.shape.vocab_size)
    results = measure(
        found,
        Target(loaded.model, found.config.feature_layers),
        sequences_of(source, length=length, rows=max(1, min(sequences, 16384 // length)), count=sequences),
        kept,
        thetas=thetas,
        seed=seed,
    )
    best = max(results, key=lambda result: result.recall)
    if not best.recall > 0:
        raise SpeContextError("nothing was measured: the text has no position to ask for")
    head_map = found.config.head_map if identity else best.head_map
    found.config = replace(found.config, head_map=head_map, rope_theta=best.theta)
    found.config.check_target(loaded.shape)
    save_head(found, place)
    report: dict[str, Any] = {
        "head": str(place),
        "budget": kept,
        "length": length,
        "rope_theta": best.theta,
        "recall": best.recall,
        "recall_identity_map": best.identity_recall,
        "head_map": head_map,
        "thetas": {f"{result.theta:g}": result.recall for result in results},
        "coverage": best.coverage.tolist(),
    }
    if as_json:
        print(json.dumps(report))
        return
    identity_text = "" if best.identity_recall is None else f" (identity map {best.identity_recall:.4f})"
    print(f"attention recall at {kept} of {length} tokens: {best.recall:.4f}{identity_text}, RoPE base {best.theta:g}")
    for result in results if len(results) > 1 else ():
        print(f"  RoPE base {result.theta:g}: {result.recall:.4f}")
    for layer, row in enumerate(head_map or ()):
        print(f"  layer {layer}: groups {' '.join(map(str, row))}")
    print(f"wrote {place}")


def parse_thetas(text: str | None, own: float) -> tuple[float, ...]:
    """RoPE bases to try, the head's own first; none where no choice was asked for.

    Raises:
        UsageError: not numbers above 0.
    """
    if text is None:
        return ()
    if text == "auto":
        return tuple(dict.fromkeys((own, *AUTOMATIC_THETAS)))
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--theta takes 'auto' or numbers with commas, such as 10000,500000; got '{text}'") from error
    if any(not 0 < value < float("inf") for value in values):
        raise UsageError(f"RoPE bases must be above 0; got '{text}'")
    return tuple(dict.fromkeys((own, *values)))
