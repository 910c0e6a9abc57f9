"""`specontext distill`: train a retrieval head for a target model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from specontext.cli.terminal import MODEL_HELP, UsageError, error_console, quiet_libraries


def distill(
    target: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the head and of the training's checkpoints.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="SPEC",
            help="Text file, directory, .jsonl or .parquet file, hf:NAME of a data set, tasks, or tasks:KIND,...; repeatable.",
        ),
    ],
    objective: Annotated[
        str, typer.Option("--objective", help="attention, output (EAGLE-3's own, trains a whole draft) or both.")
    ] = "attention",
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimizer.")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training that was stopped in DIR.")] = False,
    start: Annotated[
        str | None, typer.Option("--start", metavar="HEAD", help="Head directory or EAGLE-3 draft to go on from.")
    ] = None,
    variant: Annotated[str, typer.Option("--variant", help="features or embedding.")] = "features",
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads. Default: the target's.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Retrieval groups. Default: the target's.")] = None,
    head_dim: Annotated[int | None, typer.Option("--head-dim", help="Width of a head. Default: the target's.")] = None,
    feature_layers: Annotated[
        str | None, typer.Option("--feature-layers", metavar="A,B,C", help="Default: 2, L/2, L-3, as EAGLE-3.")
    ] = None,
    rope_theta: Annotated[float, typer.Option("--rope-theta", help="RoPE base of a new head.")] = 10000.0,
    length: Annotated[
        int | None,
        typer.Option("--length", help="Longest sequences in tokens; half are this long. Default: 4096, or the model's maximum."),
    ] = None,
    tokens_per_step: Annotated[int, typer.Option("--tokens-per-step", help="Tokens of one optimizer step.")] = 16384,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Batches whose gradients make one step.")] = 1,
    queries: Annotated[int, typer.Option("--queries", help="Query positions of each sequence (attention).")] = 256,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Highest rate; warm-up, then a cosine.")] = 1e-3,
    unroll_steps: Annotated[int, typer.Option("--unroll-steps", help="Steps of the training-time test (output).")] = 7,
    output_weight: Annotated[float, typer.Option("--output-weight", help="Weight of the output loss with 'both'.")] = 1.0,
    draft_vocabulary: Annotated[
        int | None, typer.Option("--draft-vocabulary", help="Tokens that the draft can predict. Default: all.")
    ] = None,
    on_policy: Annotated[
        float, typer.Option("--on-policy", metavar="SHARE", help="Share of sequences that the target generates itself.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of these generations.")] = 1.0,
    recommended_budget: Annotated[
        int | None, typer.Option("--recommended-budget", help="Budget that the head's config will recommend.")
    ] = None,
    yarn: Annotated[bool, typer.Option("--yarn/--no-yarn", help="Serve contexts beyond the trained length by YaRN.")] = True,
    precision: Annotated[
        str, typer.Option("--precision", help="Matrix products in float32 or bfloat16; weights of the head stay in float32.")
    ] = "float32",
    dtype: Annotated[str, typer.Option("--dtype", help="Number format of the target's weights.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    measure_every: Annotated[int, typer.Option("--measure-every", help="Steps between measurements of held-out recall.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, data and query positions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the held-out recall as one JSON object.")] = False,
) -> None:
    """Train a retrieval head on what a target model attends to, on what it says, or on both.

    Progress goes to standard error and to DIR/log.jsonl; the head is written to DIR, a whole draft to DIR/draft. The target's
    weights, one layer's attention of the sampled queries and the head's training state must fit on the device.
    """
    quiet_libraries()
    from specontext.distill.session import HeadShape, Session, mixed_lengths, parse_layers
    from specontext.distill.trainer import DistillConfig
    from specontext.locations import shape_of

    if not data:
        raise UsageError("give the training data with --data, for example --data corpus.jsonl or --data tasks")
    longest = length if length is not None else min(4096, shape_of(target).max_position)
    layers = None if feature_layers is None else parse_layers(feature_layers)
    config = DistillConfig(
        steps=steps,
        objective=objective,
        lengths=mixed_lengths(longest),
        tokens_per_step=tokens_per_step,
        accumulate=accumulate,
        precision=precision,
        learning_rate=learning_rate,
        queries=queries,
        unroll_steps=unroll_steps,
        output_weight=output_weight,
        measure_every=measure_every,
        seed=seed,
    )
    session = Session(
        target=target,
        out=out,
        data=tuple(data),
        config=config,
        length=longest,
        shape=HeadShape(variant, heads, kv_heads, head_dim, layers, rope_theta),
        start=start,
        on_policy=on_policy,
        temperature=temperature,
        draft_vocabulary=draft_vocabulary,
        recommended_budget=recommended_budget,
        yarn=yarn,
        dtype=dtype,
        device=device,
    )
    console = error_console()

    def report(row: dict[str, float]) -> None:
        if row["step"] % 10 == 0 or any(name.startswith("recall") for name in row):
            console.print(escape("  ".join(f"{name} {value:g}" for name, value in row.items())), style="dim")

    recall = session.run(resume=resume, report=report)
    if as_json:
        print(json.dumps({"head": str(out), "steps": steps, "held_out": recall}))
    else:
        print(f"wrote the head to {out}")
        for name, value in recall.items():
            print(f"{name} {value:.3f}")
