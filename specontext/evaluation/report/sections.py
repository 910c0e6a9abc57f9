"""The chapters of a report, from the answer to the glossary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specontext.evaluation.report.averages import mean_over_tasks, mean_pairs, seen_from
from specontext.evaluation.report.continuation import continuation_chapter
from specontext.evaluation.report.fidelity import fidelity_chapter
from specontext.evaluation.report.methods import describe, marks_of
from specontext.evaluation.report.numbers import DASH, anything, duration, listed, percent, whole
from specontext.evaluation.report.parts import Code, Document, Fold, Heads, Part, Pictures, Section, Table, Terms
from specontext.evaluation.report.pictures import accuracy_against_reading, amounts, axis_of, forest, shares
from specontext.evaluation.report.places import in_words, places_by_reason
from specontext.evaluation.report.results import Results, Row, flat, ordered, unique
from specontext.evaluation.report.statements import Statement, headline, opening
from specontext.evaluation.report.tables import measured_table, pair_table, record_table, score_table, sorted_rows
from specontext.evaluation.report.terms import GLOSSARY
from specontext.retrieval.registry import FULL

LONG_OUTPUT = 32  # mean output tokens from which a suite's output lengths are drawn
PANELS = 6
SKIPPED = {  # entries of `meta` that say what is missing
    "notes": "Left out, skipped, or run with a reservation",
    "skipped": "Skipped",
    "failed": "Failed",
    "left_out": "Left out",
    "errors": "Errors",
}


def document(results: Results) -> Document:
    """The whole report; chapters that have nothing to say are left out."""
    chapters = [
        Section("answer", "What was compared, and the answer", tuple(opening(results) if results.rows else ())),
        Section("fidelity", "What is lost against full attention", tuple(fidelity_chapter(results))),
        Section("continuation", "Long continuations beside full attention's", tuple(continuation_chapter(results))),
        Section("accuracy", "Accuracy against tokens read", tuple(_accuracy(results))),
        Section("differences", "The same problems, method against method", tuple(_differences(results))),
        Section("selection", "What the selections cover", tuple(_selection(results))),
        Section("answers", "Length of the answers and time to answer", tuple(_answers(results))),
        Section("tasks", "Task by task", tuple(_tasks(results))),
        Section("heads", "What the heads read", tuple(_heads(results))),
        Section("missing", "What is missing, and why", tuple(_missing(results))),
        Section("made", "How this was made", tuple(_made(results))),
        Section("terms", "Methods and terms", tuple(_terms(results))),
    ]
    model, head = results.meta.get("model"), results.meta.get("head")
    title = f"{model}: does it keep its accuracy?" if model and results.rows else f"{model or 'Evaluation'}: what the heads read"
    said = [f"weights {results.meta['weights']}"] if results.meta.get("weights") else []
    said += [f"retrieval head {head}"] if head else []
    said += [f"suite {listed(results.suites)}"] if results.rows else []
    said += [str(results.meta["date"])] if results.meta.get("date") else []
    return Document(title, " · ".join(said), tuple(chapter for chapter in chapters if chapter.parts))


def _accuracy(results: Results) -> Iterator[Part]:
    marks = marks_of(results.methods)
    for suite in results.suites:
        rows = results.of(suite)
        means, partial = mean_over_tasks(rows)
        lengths = ordered(mean["length"] for mean in means)
        pictures = [svg for length in lengths if (svg := accuracy_against_reading(suite, means, marks, length))]
        if pictures:
            words = "Accuracy against tokens read, one picture for each length; the column “on the front” names the Pareto front."
            yield Pictures(tuple(pictures), words)
        tasks = unique(row["task"] for row in rows)
        if len(tasks) == 1:
            yield measured_table(f"{suite}, {tasks[0]}", rows, results.methods, front=True)
        elif means:
            title = f"{suite}: means over {_tasks_of(means)}"
            yield measured_table(title, [_told(mean) for mean in means], results.methods, front=True)
        if partial:
            cells = [f"{_cell(cell)} (without {listed(cell['missing']) if cell['missing'] else 'any score'})" for cell in partial]
            yield Statement(
                "No means are given for cells that lack a task, since they could not be compared:",
                items=tuple(cells),
                title=suite,
            )


def _tasks_of(means: list[Row]) -> str:
    counts = ordered(mean["tasks"] for mean in means)
    if counts == [1]:
        return "one task"
    return f"{whole(counts[0])} tasks" if len(counts) == 1 else f"the tasks of each length ({listed([whole(c) for c in counts])})"


def _told(mean: Row) -> Row:
    return {name: value for name, value in mean.items() if name not in ("tasks", "least_n")}


def _differences(results: Results) -> Iterator[Part]:
    marks, main = marks_of(results.methods), results.main
    for suite in results.suites:
        pairs = results.pairs_of(suite)
        if not pairs or main is None:
            continue
        mine, tasks = seen_from(main, pairs), unique(pair["task"] for pair in pairs)
        means = _sorted_pairs(seen_from(main, mean_pairs(pairs)))
        pictures = []
        for length in ordered(pair["length"] for pair in means):
            some = [pair for pair in means if pair["length"] == length]
            where = f", {whole(length)} tokens" if length else ""
            pictures.append(forest(some, marks, title=f"{suite}{where}: {main} minus …"))
        if drawn := tuple(svg for svg in pictures if svg):
            yield Pictures(
                drawn, f"Differences of {main} to the other methods with their intervals; the table has the same numbers."
            )
        if means and len(tasks) > 1:
            yield pair_table(f"{suite}: {main} minus each other method, mean over tasks", means)
        if mine:
            table = pair_table(f"{suite}: {main} minus each other method", _sorted_pairs(mine))
            yield Fold(f"{suite}: {main} against the others on each task ({len(mine):,})", (table,)) if len(tasks) > 1 else table
        others = [pair for pair in pairs if main not in (pair["method"], pair["other"])]
        if others:
            table = pair_table(f"{suite}: the other methods against each other", _sorted_pairs(others))
            yield Fold(f"{suite}: the other methods against each other ({len(others):,})", (table,))


def _sorted_pairs(pairs: list[Row]) -> list[Row]:
    rank = {name: n for n, name in enumerate(unique(pair["other"] for pair in pairs))}
    return sorted(pairs, key=lambda pair: (pair["task"] or "", pair["length"] or 0, rank[pair["other"]], pair["budget"] or 0))


def _selection(results: Results) -> Iterator[Part]:
    marks = marks_of(results.methods)
    for suite in results.suites:
        means, _ = mean_over_tasks(results.of(suite))
        for what, label in (("attention_recall", "attention recall"), ("overlap", "overlap of steps")):
            cells = [mean for mean in means if mean[what] is not None and mean["budget"]]
            along = axis_of(cells)
            panels = ordered(cell["budget" if along == "length" else "length"] for cell in cells)
            pictures = []
            for panel in panels[-PANELS:]:
                some = [cell for cell in cells if cell["budget" if along == "length" else "length"] == panel]
                where = f"budget {whole(panel)}" if along == "length" else f"{whole(panel)} tokens" if panel else "own lengths"
                pictures.append(shares(suite, some, marks, what, label=label, along=along, where=where))
            if drawn := tuple(svg for svg in pictures if svg):
                yield Statement(_of_selection(what, cells, results.main), title=suite)
                yield Pictures(drawn, f"{suite}: {label} of every method; the numbers stand in the tables of means and tasks.")


def _of_selection(what: str, cells: list[Row], main: str | None) -> str:
    cell = headline(cells, main)
    meaning = {
        "attention_recall": "Attention recall is how much of the attention to everything falls on what was read",
        "overlap": "Overlap is how much of what is chosen the step before had chosen, too, so that it need not be loaded again",
    }[what]
    said = f"{meaning}."
    if cell is not None:
        where = f" with {whole(cell['length'])} tokens of context" if cell["length"] else ""
        said += f" {main} at budget {whole(cell['budget'])}{where}: {percent(cell[what])}."
    return said


def _answers(results: Results) -> Iterator[Part]:
    marks = marks_of(results.methods)
    for suite in results.suites:
        means, _ = mean_over_tasks(results.of(suite))
        if not any((mean["output_tokens"] or 0) >= LONG_OUTPUT for mean in means):
            continue
        longest = ordered(mean["length"] for mean in means)[-1]
        cells = sorted_rows([mean for mean in means if mean["length"] == longest], results.methods)
        where = f", {whole(longest)} tokens of context" if longest else ""
        pictures = (
            amounts(cells, marks, "output_tokens", label=f"{suite}{where}: output tokens", shown=whole),
            amounts(cells, marks, _time(cells), label=f"{suite}{where}: time to answer", shown=duration),
        )
        yield Statement(
            "A method that reads less may write more before it comes to an answer, and then saves less time than its "
            "steps suggest. These are means without intervals; small differences mean nothing.",
            title=suite,
        )
        yield Pictures(
            tuple(svg for svg in pictures if svg), "Output tokens and time to answer; the numbers stand in the tables."
        )
        if (table := _answer_table(suite, cells)) is not None:
            yield table


def _time(cells: list[Row]) -> str:
    """What says how long an answer took: wall time a problem where the time of single answers is not known."""
    return "answer_seconds" if any(cell["answer_seconds"] is not None for cell in cells) else "seconds"


def _answer_table(suite: str, cells: list[Row]) -> Table | None:
    """Amounts beside those of full attention; None without it."""
    full = next((cell for cell in cells if cell["method"] == FULL), None)
    if full is None:
        return None

    def times(cell: Row, what: str) -> str:
        return f"{cell[what] / full[what]:.2f} ×" if cell[what] is not None and full[what] else DASH

    time = _time(cells)
    columns = ("method", "budget", "output tokens", "of full's", "time to answer", "of full's time")
    rows = tuple(
        (
            *(cell["method"], whole(cell["budget"]), whole(cell["output_tokens"]), times(cell, "output_tokens")),
            *(duration(cell[time]), times(cell, time)),
        )
        for cell in cells
    )
    return Table(f"{suite}: amounts beside those of full attention", columns, rows, 2)


def _tasks(results: Results) -> Iterator[Part]:
    for suite in results.suites:
        rows = results.of(suite)
        tasks = unique(row["task"] for row in rows)
        if len(tasks) == 1:
            continue  # its table stands beside the picture
        if any(row["score"] is not None for row in rows):
            yield score_table(f"{suite}: scores at a glance", rows, results.methods)
        for task in tasks:
            table = measured_table(f"{suite}, {task}", [row for row in rows if row["task"] == task], results.methods)
            yield Fold(f"{suite}, {task}: everything measured", (table,))


def _heads(results: Results) -> Iterator[Part]:
    record = results.selections
    if record is not None:
        steps = record["steps"]
        shares = [head["recall"] for step in steps for layer in step["heads"] for head in layer]
        budget = f" with a budget of {whole(record['budget'])}" if record["budget"] else ""
        yield Heads(
            f"{record['model']} read a prompt of {whole(record['prompt_tokens'])} tokens and then wrote; {len(steps)} steps "
            f"are recorded with the method {record['method']}{budget}. On average the entries that were read held "
            f"{percent(sum(shares) / len(shares))} of the true attention."
        )


def _missing(results: Results) -> Iterator[Part]:
    for name in SKIPPED:
        if records := results.meta.get(name):
            yield from _left_out(SKIPPED[name], records if isinstance(records, list) else _records(records))
    empty = [{name: row[name] for name in ("method", "budget", "task", "length")} for row in results.rows if row["score"] is None]
    if empty:
        yield Statement("Rows without a score, of which no mean is made:", items=tuple(in_words(empty)))
    for suite in results.suites:
        rows = results.of(suite)
        cells = unique((row["method"], row["budget"]) for row in rows)
        places = unique((row["task"], row["length"]) for row in rows)
        there = {(row["method"], row["budget"], row["task"], row["length"]) for row in rows}
        absent = [
            {"method": method, "budget": budget, "task": task, "length": length}
            for task, length in places
            for method, budget in cells
            if (method, budget, task, length) not in there
        ]
        if absent:
            yield Statement(
                "Cells that other methods or lengths have and that were not run:", items=tuple(in_words(absent)), title=suite
            )


def _left_out(title: str, records: list[Any]) -> Iterator[Part]:
    """Every reason once, with all places; records without a reason as they are."""
    reasons = places_by_reason(each for each in records if isinstance(each, dict) and each.get("why"))
    if reasons:
        yield Table(title, ("why", "where"), tuple((why, "; ".join(where) or DASH) for why, where in reasons.items()), 2)
    if rest := [each for each in records if not (isinstance(each, dict) and each.get("why"))]:
        yield record_table(title, rest)


def _records(records: Any) -> list[Any]:
    return [{"what": name, "why": anything(why)} for name, why in records.items()] if isinstance(records, dict) else [records]


def _cell(row: Row) -> str:
    said = [row["method"]]
    said += [f"budget {whole(row['budget'])}"] if row["budget"] else []
    said += [row["task"]] if row.get("task") else []
    said += [f"{whole(row['length'])} tokens"] if row["length"] else []
    return ", ".join(said)


def _made(results: Results) -> Iterator[Part]:
    meta = {name: value for name, value in results.meta.items() if name not in SKIPPED}
    command = meta.pop("command", None)
    if command:
        yield Statement("This command makes the same numbers again:")
        yield Code(" ".join(map(str, command)) if isinstance(command, list) else str(command))
    rows = tuple((name.replace("_", " "), _meta_text(value)) for name, value in flat(meta).items())
    if rows:
        yield Table("What it was made with", ("what", "value"), rows, 2)
    if results.rows:
        yield Statement("The numbers themselves are in results.json beside this file, single answers in samples.jsonl.")


def _meta_text(value: Any) -> str:
    return (
        ", ".join(map(anything, value))
        if isinstance(value, list)
        else anything(value)
        if not isinstance(value, int)
        else str(value)
    )


def _terms(results: Results) -> Iterator[Part]:
    described = [(method, words) for method in results.methods if (words := describe(method))]
    yield Terms((*described, *GLOSSARY.items()))
