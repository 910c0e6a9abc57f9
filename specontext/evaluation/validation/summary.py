"""The summary of a validation in Markdown: plain statements first, then the numbers that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specontext.evaluation.report.averages import mean_over_tasks, mean_pairs
from specontext.evaluation.report.numbers import anything, duration, interval, listed, percent, points, size, whole
from specontext.evaluation.report.places import places_by_reason
from specontext.evaluation.validation.systems import FULL, OFFLOADED, RESIDENT, parting

Content = dict[str, Any]
Row = dict[str, Any]
OWN = "speculative"


def summary(content: Content, evaluated: Content) -> str:
    """The text of `summary.md`.

    Args:
        content: of `validation.json`.
        evaluated: content of `results.json` beside it, as far as there is one.
    """
    fidelity, ruler = (_of(evaluated["rows"], suite) for suite in ("fidelity", "ruler"))
    ruler_means, ruler_pairs = mean_over_tasks(ruler)[0], mean_pairs(_of(evaluated["pairs"], "ruler"))
    systems = {system["name"]: system for system in content["systems"]}
    said = [
        *_say_fidelity(fidelity),
        *_say_ruler(ruler_means, ruler_pairs, len({row["task"] for row in ruler})),
        *_say_chain(systems),
        *_say_speed(systems),
        *(f"**Not run: {name}.** {why}" for name, why in content["failures"].items()),
        *_say_left_out(content, evaluated.get("meta", {}).get("notes", [])),
    ]
    parts = [
        f"# SpeContext on {content['model']['name']}",
        _setting(content),
        "## In short",
        "\n".join(f"- {sentence}" for sentence in said) or "Nothing has been measured yet.",
    ]
    if fidelity:
        parts += ["## Fidelity: next-token distributions beside those of full attention", _fidelity_table(fidelity)]
        parts += [line for row in fidelity if (line := _layers(row))]
    if ruler_means:
        parts += ["## RULER: mean over its tasks", _ruler_table(ruler_means, ruler_pairs)]
    if systems:
        parts += ["## A long chain of thought", _chain_table(systems.values())]
        parts += ["## Decoding, one request", _speed_table(systems.values())]
        parts += ["## Memory", _memory_table(systems.values())]
    if fidelity or ruler_means:
        parts.append("Every task, interval and paired difference: `report.html`, raw rows in `results.json`.")
    return "\n\n".join(parts) + "\n"


def _of(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite]


def _setting(content: Content) -> str:
    host, versions = content["host"], content["versions"]
    machine = f"{host['system']}, {host['cores']} cores, {size(host['host_memory_free'])} of host memory free"
    if "gpu" in host:
        machine = f"{host['gpu']} with {size(host['gpu_memory'])}, CUDA {host['cuda']}; {machine}"
    settings = content["settings"]
    lines = [
        f"- model: {content['model']['name']}, {content['model']['dtype']}; retrieval head: {settings['retrieval_head']}",
        f"- machine: {machine}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- {content['date']}; contexts of up to {whole(content['longest_context'])} tokens; seed {settings['seed']}",
    ]
    if settings["command"]:
        lines.append(f"- command: `{settings['command']}`")
    return "\n".join(lines)


# Statements -----------------------------------------------------------------------------------------------------------


def _say_fidelity(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for each text: the method of the retrieval head at the longest context, with the smallest budget."""
    own = [row for row in rows if row["method"] == OWN]
    for text in dict.fromkeys(row["task"] for row in own):
        longest = max(row["length"] for row in own if row["task"] == text)
        row = min((row for row in own if (row["task"], row["length"]) == (text, longest)), key=lambda row: row["budget"])
        scores = row["scores"]
        yield (
            f"**Fidelity on {text}.** Reading {whole(row['tokens_read'])} of {whole(row['length'])} tokens, {OWN} finds the same "
            f"most likely next token as full attention in {_with_interval(row)} of cases; KL divergence "
            f"{scores['kl_divergence']:.3g} nats, perplexity {scores['perplexity']:.4g} instead of "
            f"{scores['perplexity'] / scores['perplexity_ratio']:.4g} (× {scores['perplexity_ratio']:.4g}); it reads "
            f"{percent(row['attention_recall'])} of the attention."
        )


def _say_ruler(means: Sequence[Row], pairs: Sequence[Row], tasks: int) -> Iterator[str]:
    for mean in _own_by_length(means):
        full = next((one for one in means if one["method"] == FULL and one["length"] == mean["length"]), None)
        sentence = f"**RULER, {tasks} tasks, {whole(mean['length'])} tokens.** {OWN} with budget {whole(mean['budget'])}: "
        sentence += _with_interval(mean)
        pair = _to_full(mean, pairs)
        if full is not None and pair is not None:
            sentence += f", full attention {percent(full['score'])}: {_difference(pair)}"
        yield sentence + "."


def _own_by_length(means: Sequence[Row]) -> Iterator[Row]:
    own = [mean for mean in means if mean["method"] == OWN]
    for length in sorted({mean["length"] for mean in own}):
        yield min((mean for mean in own if mean["length"] == length), key=lambda mean: mean["budget"])


def _to_full(mean: Row, pairs: Sequence[Row]) -> Row | None:
    place = (mean["method"], mean["budget"], mean["length"])
    return next((p for p in pairs if p["other"] == FULL and (p["method"], p["budget"], p["length"]) == place), None)


def _difference(pair: Row) -> str:
    words = f"{points(pair['difference'])} points"
    return words if pair["ci_low"] is None else f"{words}, 95 % interval {interval(pair['ci_low'], pair['ci_high'], points)}"


def _with_interval(row: Row) -> str:
    return percent(row["score"]) + ("" if row["ci_low"] is None else f" {interval(row['ci_low'], row['ci_high'])}")


def _say_chain(systems: dict[str, Content]) -> Iterator[str]:
    full = systems.get(FULL, {}).get("chain")
    for name in (RESIDENT, OFFLOADED):
        chain = systems.get(name, {}).get("chain")
        if full is None or chain is None:
            continue
        ours, theirs = chain["token_ids"], full["token_ids"]
        place = parting(theirs, ours)
        same = f"the same {whole(len(ours))} tokens as full attention"
        other = f"{whole(len(ours))} tokens, full attention {whole(len(theirs))}; the first {whole(place)} are the same"
        yield (
            f"**A long chain of thought, {name}:** {same if place is None else other}. "
            f"Answer: {_right(chain)}; with full attention {_right(full)}. It took {duration(chain['seconds'])}, full attention "
            f"{duration(full['seconds'])}."
        )


def _right(chain: Content) -> str:
    steps = chain["scores"].get("steps")
    final = "right" if chain["scores"]["score"] == 1 else "wrong"
    return final if steps is None else f"{final} ({percent(steps)} of its steps right)"


def _say_speed(systems: dict[str, Content]) -> Iterator[str]:
    full = {speed["context"]: speed for speed in systems.get(FULL, {}).get("speeds", [])}
    for name in (RESIDENT, OFFLOADED):
        for speed in systems.get(name, {}).get("speeds", [])[-1:]:
            sentence = (
                f"**Decoding after {whole(speed['context'])} tokens, {name}:** {duration(speed['step_s'])} a token "
                f"({1 / speed['step_s']:.1f} tokens/s)"
            )
            other = full.get(speed["context"])
            if other is not None:
                sentence += f", full attention {duration(other['step_s'])}: {other['step_s'] / speed['step_s']:.2f} times as fast"
            else:
                sentence += "; full attention was not measured there"
            yield sentence + "."
    for name, system in systems.items():
        if system["failure"]:
            yield f"**{name} could not go on:** {system['failure']}"


def _say_left_out(content: Content, notes: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each reason for which something is missing in the tables."""
    if lengths := content["too_long"]:
        end = whole(content["model"]["longest"])
        yield f"**Left out: lengths of {listed([whole(n) for n in lengths])} tokens.** The model's contexts end at {end}."
    for why, places in places_by_reason(notes).items():
        yield f"**{'; '.join(places)}:** {why}"


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fidelity_table(rows: Sequence[Row]) -> str:
    columns = ("text", "tokens", "method", "budget", "windows", "agreement", "KL (nats)", "perplexity", "to full", "recall")
    return _table(
        columns,
        [
            (
                row["task"],
                whole(row["length"]),
                row["method"],
                whole(row["budget"]),
                whole(row["n"]),
                _with_interval(row),
                anything(row["scores"]["kl_divergence"]),
                anything(row["scores"]["perplexity"]),
                f"× {row['scores']['perplexity_ratio']:.4g}",
                percent(row["attention_recall"]),
            )
            for row in rows
        ],
    )


def _layers(row: Row) -> str | None:
    if row["method"] != OWN:
        return None
    shares = " ".join(f"{share:.3f}" for share in row["attention_recall_by_layer"])
    return (
        f"Attention recall of every layer, {row['task']}, {whole(row['length'])} tokens, budget {whole(row['budget'])}: {shares}"
    )


def _ruler_table(means: Sequence[Row], pairs: Sequence[Row]) -> str:
    columns = ("tokens", "method", "budget", "problems", "score", "minus full attention", "tokens read", "overlap")
    rows = []
    for mean in sorted(means, key=lambda mean: mean["length"]):
        pair = _to_full(mean, pairs)
        rows.append(
            (
                whole(mean["length"]),
                mean["method"],
                whole(mean["budget"]),
                whole(mean["n"]),
                _with_interval(mean),
                _difference(pair) if pair is not None else "–",
                whole(mean["tokens_read"]),
                percent(mean["overlap"]),
            )
        )
    return _table(columns, rows)


def _chain_table(systems: Any) -> str:
    return _table(
        ("system", "budget", "tokens", "end", "answer", "time"),
        [
            (
                system["name"],
                whole(system["budget"]),
                whole(len(chain["token_ids"])),
                chain["finish_reason"],
                _right(chain),
                duration(chain["seconds"]),
            )
            for system in systems
            if (chain := system["chain"]) is not None
        ],
    )


def _speed_table(systems: Any) -> str:
    columns = ("context", "system", "time a token", "tokens/s", "tokens read", "loaded a token", "overlap", "prefill")
    speeds = [(speed, system["name"]) for system in systems for speed in system["speeds"]]
    return _table(
        columns,
        [
            (
                whole(speed["context"]),
                name,
                duration(speed["step_s"]),
                f"{1 / speed['step_s']:.1f}",
                whole(speed["tokens_read"]),
                size(speed["bytes_loaded"]),
                percent(speed["overlap"]),
                duration(speed["prefill_s"]),
            )
            for speed, name in sorted(speeds, key=lambda pair: pair[0]["context"])
        ],
    )


def _memory_table(systems: Any) -> str:
    return _table(
        ("system", "KV on the device", "KV in host memory", "peak of the GPU, weights included"),
        [
            (system["name"], size(system["device_kv_bytes"]), size(system["host_kv_bytes"]), size(system["peak_bytes"]))
            for system in systems
        ],
    )
