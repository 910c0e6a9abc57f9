"""`specontext distill`: train a retrieval head for a target model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from specontext.cli.options import OWN_CODE, Settings, refuse_unused, with_settings
from specontext.cli.terminal import MODEL_HELP, UsageError, error_console, named_path, quiet_libraries

# Options that mean nothing to some trainings, by what would give them a meaning.
OF_NEW_HEADS = ("variant", "bands", "heads", "key_heads", "head_dim", "key_inputs", "query_rank", "feature_layers", "rope_theta")
OF_ATTENTION = (
    *("queries", "teacher_layers", "attention_weight", "effect_weight", "replay_queries"),
    *("loop_learning_rate", "loop_weight"),
)
OF_OUTPUT = ("unroll_steps", "draft_vocabulary")
BESIDE = ("of_shared", "kl_shared", "kl_window", "perplexity", "agreement_")  # in the log, and too much for a line


@with_settings(method=(), engine=OWN_CODE)
def distill(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    *,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="DIR", parser=named_path, help="Directory of the head and of the training's checkpoints."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="SPEC",
            help="Text file, directory, .jsonl or .parquet file, hf:NAME of a data set, tasks, or tasks:KIND,...; repeatable; "
            "SPEC=3 is drawn from three times as often.",
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
    bands: Annotated[
        int | None,
        typer.Option("--bands", help="Bands of layers with groups of their own. Default: 3, of fewer than 12 layers 1."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="Query heads. Default: for each group as many as the target's KV heads have.")
    ] = None,
    key_heads: Annotated[
        int | None, typer.Option("--key-heads", help="Keys stored of a token, which groups share. Default: 1.")
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option("--head-dim", help="Width of queries and keys. Default: that of all the target's keys, at most 512."),
    ] = None,
    key_inputs: Annotated[
        str | None,
        typer.Option(
            "--key-inputs", help="Features that keys read: before (of the last token) or around (their own, too: default)."
        ),
    ] = None,
    query_rank: Annotated[
        int | None,
        typer.Option("--query-rank", help="Width between two factors of the query projection. Default: where they are smaller."),
    ] = None,
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
    teacher_layers: Annotated[
        str, typer.Option("--teacher-layers", help="Attention of the layers that read a group: their max or mean (attention).")
    ] = "max",
    attention_weight: Annotated[
        float, typer.Option("--attention-weight", help="Weight of what the target attends to (attention).")
    ] = 0.5,
    effect_weight: Annotated[
        float, typer.Option("--effect-weight", help="Weight of what each token does to the target's output (attention).")
    ] = 1.0,
    replay_queries: Annotated[
        int, typer.Option("--replay-queries", help="Queries of each sequence that run again for effects and in the loop.")
    ] = 64,
    loop_steps: Annotated[
        int, typer.Option("--loop-steps", help="Further steps, with the head's selection inside the target.")
    ] = 0,
    loop_learning_rate: Annotated[float, typer.Option("--loop-learning-rate", help="Highest rate of these steps.")] = 5e-4,
    loop_weight: Annotated[
        float, typer.Option("--loop-weight", help="Weight in these steps of what the selection loses, beside the others.")
    ] = 5.0,
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
    save_dtype: Annotated[
        str, typer.Option("--save-dtype", help="Number format of the written head's matrices: float32, bfloat16 or float16.")
    ] = "float32",
    measure_every: Annotated[
        int, typer.Option("--measure-every", help="Steps between measurements on held-out text, of which the best head is kept.")
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, data and query positions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured on held-out text as one JSON object.")] = False,
    settings: Settings,
) -> None:
    """Train a retrieval head on what a target model attends to, on what it says, or on both.

    Progress goes to standard error and to DIR/log.jsonl; the head is written to DIR, a whole draft to DIR/draft. Of all heads
    that were measured on held-out text, the one is written with which the target's output diverges least. The target's weights,
    keys and values of a batch, one layer's attention of the sampled queries and the training state must fit on the device.
    """
    quiet_libraries()
    from specontext.distill.new_head import HeadShape, standard_shape
    from specontext.distill.session import Session, mixed_lengths, parse_layers
    from specontext.distill.settings import DistillConfig
    from specontext.locations import shape_of

    if not data:
        raise UsageError("give the training data with --data, for example --data corpus.jsonl or --data tasks")
    without = {
        **(dict.fromkeys(OF_NEW_HEADS, "with --start, whose head has its own form") if start is not None else {}),
        **({} if objective != "output" else dict.fromkeys(OF_ATTENTION, "with --objective output")),
        **({} if objective != "attention" else dict.fromkeys(OF_OUTPUT, "without --objective output or both")),
        **({} if objective == "both" else {"output_weight": "without --objective both"}),
        **({} if on_policy else {"temperature": "without --on-policy"}),
        **({} if loop_steps else dict.fromkeys(("loop_learning_rate", "loop_weight"), "without --loop-steps")),
    }
    if variant == "embedding":
        without |= {"feature_layers": "with --variant embedding, which reads no features"} | without
    refuse_unused(context, without)
    target_shape = shape_of(target, **settings.engine)
    longest = length if length is not None else min(4096, target_shape.max_position)
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
        teacher_layers=teacher_layers,  # type: ignore[arg-type]  # checked where it is made
        attention_weight=attention_weight,
        effect_weight=effect_weight,
        replay_queries=replay_queries,
        loop_steps=loop_steps,
        loop_learning_rate=loop_learning_rate,
        loop_weight=loop_weight,
        unroll_steps=unroll_steps,
        output_weight=output_weight,
        measure_every=measure_every,
        seed=seed,
    )
    form: dict[str, Any] = {
        "heads": heads,
        "head_dim": head_dim,
        "feature_layers": layers,
        "rope_theta": rope_theta,
        "bands": bands,
        "key_heads": key_heads,
        "key_inputs": key_inputs,
        "query_rank": query_rank,
    }
    standard = HeadShape(variant) if config.speaks else standard_shape(target_shape, variant)
    session = Session(
        target=target,
        out=out,
        data=tuple(data),
        config=config,
        length=longest,
        shape=replace(standard, **{name: value for name, value in form.items() if value is not None}),
        start=start,
        on_policy=on_policy,
        temperature=temperature,
        draft_vocabulary=draft_vocabulary,
        recommended_budget=recommended_budget,
        yarn=yarn,
        dtype=dtype,
        device=device,
        save_dtype=save_dtype,
        **settings.engine,
    )
    console = error_console()

    def report(row: dict[str, float]) -> None:
        if row["step"] % 10 == 0 or "recall" in " ".join(row):
            shown = {name: value for name, value in row.items() if not name.startswith(BESIDE)}
            console.print(escape("  ".join(f"{name} {value:g}" for name, value in shown.items())), style="dim")

    held_out = session.run(resume=resume, report=report)
    if as_json:
        print(json.dumps({"head": str(out), "steps": config.total_steps, "held_out": held_out}))
        return
    kept = int(held_out.pop("kept_step"))
    why = "with the lowest held-out KL divergence"
    if not any(name.startswith("kl") for name in held_out):
        why = f"the last one, since sequences of {longest} tokens of the held-out text are too short to tell heads apart"
    print(f"wrote the head of step {kept} of {config.total_steps}, {why}, to {out}")
    for name, value in held_out.items():
        print(f"{name} {value:.4g}")
