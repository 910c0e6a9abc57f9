"""One report of all parts of a reproduction, in Markdown and HTML: what ran, what failed, and everything that was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reproduce_estimates import long_time
from reproduce_parts import AIMES, PARTS, Plan
from specontext.cli.head import as_text, head_facts
from specontext.evaluation.report.html import as_html
from specontext.evaluation.report.markdown import as_markdown
from specontext.evaluation.report.numbers import size
from specontext.evaluation.report.parts import Code, Document, Part, Section, Table
from specontext.evaluation.report.results import Results, read_results
from specontext.evaluation.report.sections import document
from specontext.evaluation.report.statements import Statement

MOST = 160  # characters of an error in the table


def write(folder: Path, plan: Plan, state: dict[str, Any]) -> None:
    """Write `report.md` and `report.html` of what is there."""
    results, summary = _results(folder, plan), folder / "validate" / "summary.md"
    validated = summary.read_text(encoding="utf-8") if summary.exists() else ""
    made = document(results)
    own = [Section("run", "What was run", tuple(_run(plan, state)))]
    if head := list(_head(plan)):
        own.append(Section("head", "The retrieval head", tuple(head)))
    last = (
        [Section("validation", "Validation: fidelity, chain of thought, time and memory", (Code(validated),))]
        if validated
        else []
    )
    title = f"SpeContext with {plan.asked.model}"
    html = as_html(Document(title, made.subtitle, (*own, *made.sections, *last)))
    text = as_markdown(Document(title, made.subtitle, (*own, *made.sections)))
    if validated:
        text += "\n" + re.sub(r"^(#+ )", r"#\1", validated, flags=re.MULTILINE)
    for name, content in (("report.md", text), ("report.html", html)):
        (folder / name).write_text(content, encoding="utf-8")


def _results(folder: Path, plan: Plan) -> Results:
    """The rows of all evaluations, beside the model and machine that they share; the validation speaks for itself."""
    files = [folder / name / "results.json" for name in (*(f"ruler-{n}" for n in plan.asked.lengths), "longbench", *AIMES)]
    found = [read_results(json.loads(file.read_text(encoding="utf-8"))) for file in files if file.exists()]
    meta = {
        name: value for name, value in (found[-1].meta if found else {}).items() if name not in ("command", "settings", "suite")
    }
    meta["notes"] = [note for one in found for note in one.meta.get("notes") or []]
    meta |= {"model": plan.asked.model, "head": plan.head}
    return Results(meta, [row for one in found for row in one.rows], [pair for one in found for pair in one.pairs])


def _run(plan: Plan, state: dict[str, Any]) -> Iterator[Part]:
    machine, commands = state["machine"], state["commands"]
    where = f"{machine['gpu']}, {size(machine['gpu_memory'])}, CUDA {machine['cuda']}; " if "gpu" in machine else ""
    where += f"{machine['system']}, {machine['cores']} cores, {size(machine['host_memory_free'])} of host memory free"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    if state["quick"]:
        yield Statement("This is a quick run, to see whether everything works: its numbers say little.", kind="worse")
    for name in state.get("failed", ()):
        errors = [known["error"] for known in commands.values() if known["part"] == name and known["error"]]
        yield Statement("; ".join(errors) or "There was no retrieval head.", kind="worse", title=f"{name} failed")
    left = [name for name in PARTS if name not in plan.asked.parts]
    if left:
        yield Statement(f"Not asked for in the last run: {', '.join(left)}.")
    yield Statement(f"{where}. {versions}. {machine['date']}.", title="Machine")
    rows = tuple(
        (known["part"], known["status"], long_time(known["seconds"]), (known["error"] or "")[:MOST])
        for known in commands.values()
    )
    yield Table("Commands in the order in which they ran", ("part", "ended", "took", "error"), rows, 2)
    yield Code("\n".join([state["command"], "", *commands]))


def _head(plan: Plan) -> Iterator[Part]:
    if (plan.head_folder / "config.json").exists() and plan.head == str(plan.head_folder):
        yield Code(as_text(head_facts(plan.head)))
    else:
        yield Statement(f"Named: {plan.head}.")
