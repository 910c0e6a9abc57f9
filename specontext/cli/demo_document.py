"""`specontext demo` for a pretrained model: a long document, a question about it, and two answers.

The document is Python's own reference, which lies on every machine that runs this.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from specontext.cli.generate import chat_prompt
from specontext.cli.terminal import human_bytes, quiet_libraries, shorten
from specontext.config import SpeContextConfig
from specontext.core import RequestOutput
from specontext.sampling_params import SamplingParams

if TYPE_CHECKING:
    from specontext import LLM

TOPICS = ("debugger", "raise", "assert", "del", "lambda", "return")
# One sentence is put into the text, so that its answer is known on every version of Python; a small model finds nothing harder.
NOTE = "A note from the kitchen: the cook of the research station is called Margaret Ellison."
PLACE = 0.65  # of the text
QUESTION = "Who is the cook of the research station?"
EXPECTED = "Margaret Ellison"
OURS = "speculative"
FRACTION = 8
ANSWER = 32  # tokens
SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Answer:
    """What a method said, and the statistics of saying it."""

    method: str
    budget: int | None
    output: RequestOutput

    def as_object(self) -> dict[str, object]:
        """What `--json` prints for it."""
        return {
            "method": self.method,
            "budget": self.budget,
            "answer": self.output.text.strip(),
            "right": EXPECTED in self.output.text,
            "stats": self.output.stats,
        }


def check_packaged() -> None:
    """Raises GGUFError unless the package with the real model is installed, HeadError unless its head is there."""
    from specontext.gguf.files import packaged_file
    from specontext.retrieval.checkpoint import head_folder

    packaged_file("smollm2")
    head_folder("smollm2")


def document(llm: LLM, tokens: int) -> str:
    """Chapters of Python's reference, cut to about `tokens` tokens, with the note between two paragraphs."""
    from pydoc_data.topics import topics

    text = "\n\n".join(str(topics[name]).strip() for name in TOPICS if name in topics)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    paragraphs = str(llm.tokenizer.decode(ids[:tokens])).split("\n\n")
    paragraphs.insert(int(PLACE * len(paragraphs)), NOTE)
    return "\n\n".join(paragraphs)


def show_document(model: str, *, length: int, as_json: bool, console: Console) -> None:
    """Ask a question about a document of at most `length` tokens, with full attention and with an eighth of the entries.

    Raises:
        SpeContextError: no such model, or none of its retrieval heads is there.
    """
    began = time.perf_counter()
    quiet_libraries()
    from specontext import LLM

    config = SpeContextConfig(method=OURS, budget=max(64, length // FRACTION), offload_layers=-1)
    llm = LLM(model, config=config, methods=("full", "streaming"), max_num_seqs=1)
    text = document(llm, min(length, llm.engine.parts.max_tokens - ANSWER - 200))
    prompt = _prompt(llm, f"{text}\n\nUsing the text above, answer this question: {QUESTION}")
    console.print(f"[bold]Python's reference: {', '.join(TOPICS)}[/bold], {len(prompt):,} tokens with the question")
    console.print(escape(shorten(text, SHOWN_CHARACTERS)), style="dim")
    console.print(f"In the middle of it stands: {NOTE}")
    console.print(f"\n[bold]{escape(QUESTION)}[/bold]")
    answers = []
    for method, budget in (("full", None), (OURS, config.budget), ("streaming", config.budget)):
        params = SamplingParams(temperature=0, max_tokens=ANSWER, method=method, budget=budget)
        [output] = llm.generate([prompt], params)
        answers.append(Answer(method, budget, output))
        label = method if budget is None else f"{method} {budget}"
        mark, colour = ("✓", "green") if EXPECTED in output.text else ("✗", "red")
        console.print(f"[{colour}]{mark}[/{colour}] {label:<16} {escape(' '.join(output.text.split()))}")
    elapsed = time.perf_counter() - began
    if as_json:
        rows = [answer.as_object() for answer in answers]
        said = {"model": model, "weights": llm.engine.loaded.weights_note, "prompt_tokens": len(prompt), "question": QUESTION}
        print(json.dumps(said | {"expected": EXPECTED, "answers": rows, "elapsed_s": elapsed}))
        return
    console.print(table(answers))
    note = llm.engine.loaded.weights_note
    console.print(
        f"{model}{'' if note is None else f', weights {note}'}; KV of all layers in host memory; {elapsed:.0f} s", style="dim"
    )


def _prompt(llm: LLM, text: str) -> list[int]:
    return chat_prompt(llm, text) if llm.tokenizer.chat_template else list(llm.tokenizer.encode(text))


def table(answers: list[Answer]) -> Table:
    """What was read and moved for each answer."""
    made = Table(title="Means over the steps of the answer", box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("method")
    for column in ("entries read", "moved a step", "choosing read", "all entries", "overlap", "ms a token"):
        made.add_column(column, justify="right")
    for answer in answers:
        stats: dict[str, Any] = answer.output.stats
        sizes = [stats[f"{name}_per_step"] for name in ("bytes_loaded", "selection_bytes", "bytes_full")]
        read, overlap, pace = stats["tokens_read_per_step"], stats["overlap"], stats["tpot_s"]
        made.add_row(
            answer.method,
            "–" if read is None else f"{read:,.0f}",
            *("–" if size is None else human_bytes(size) for size in sizes),
            "–" if overlap is None else f"{overlap:.0%}",
            "–" if pace is None else f"{1000 * pace:.0f}",
        )
    return made
