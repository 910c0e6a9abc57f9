"""Validate SpeContext with a model and its retrieval head on this machine, against full attention.

Usage: scripts/validate_real_model MODEL --retrieval-head HEAD [-o DIR] [--lengths 4096,16384] [--budgets 1024,2048] [--quick]

Runs, one after another:
  fidelity   next-token agreement, KL divergence and perplexity against full attention on any text, recall of every layer
  ruler      a part of RULER
  a long chain of thought, and the time of a token after prompts of every length, for
    full                    full attention, all KV on the device
    speculative             SpeContext, all KV on the device
    speculative, offloaded  SpeContext, all KV in host memory

Writes DIR/summary.md, which can be posted, DIR/validation.json, DIR/results.json and DIR/report.html. A stopped run goes on when
it is started again with the same DIR. --quick is a look at whether everything works: one length of 1,024 tokens, few problems.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from specontext.cli.eval import progress_bars
from specontext.cli.terminal import quiet_libraries
from specontext.errors import SpeContextError

REPOSITORY = Path(__file__).resolve().parent.parent
TEXTS = ("tasks", str(REPOSITORY / "docs"), str(REPOSITORY / "specontext" / "engine"))
QUICK: dict[str, Any] = {
    "lengths": (1024,),
    "texts": ("tasks",),
    "windows": 2,
    "problems": 2,
    "compared": 64,
    "chain_length": 1024,
    "chain_tokens": 256,
    "steps": 16,
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint directory, a Hub id, or nano")
    parser.add_argument("--retrieval-head", default="auto", help="a head or draft, directory or Hub id; auto: the model's own")
    parser.add_argument("-o", "--out", type=Path, default=Path("validation"))
    parser.add_argument("--lengths", type=numbers, help="contexts in tokens; default 4096,16384,32768")
    parser.add_argument("--budgets", type=numbers, help="KV entries that are read; default: what the head recommends")
    parser.add_argument("--methods", help="of fidelity and RULER; default full,speculative,streaming")
    parser.add_argument(
        "--text", action="append", dest="texts", help="as of specontext eval; default: tasks, docs and code of this project"
    )
    parser.add_argument("--windows", type=int, help="of each text and length; default 8")
    parser.add_argument("--problems", type=int, help="of each task and length; default 10")
    parser.add_argument("--chain-tokens", type=int, help="that the chain of thought may have; default 4096")
    parser.add_argument("--steps", type=int, help="tokens that are timed; default 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours, and numbers that say little")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    quiet_libraries()
    from specontext.evaluation.validation.run import ValidationSettings, validate

    given = {name: value for name, value in vars(asked).items() if value is not None and name != "quick"}
    given |= {name: tuple(given[name].split(",")) for name in ("methods",) if name in given}
    given |= {"texts": tuple(given["texts"])} if "texts" in given else {}
    command = shlex.join(["scripts/validate_real_model", *arguments])
    chosen = {"texts": TEXTS} | (QUICK if asked.quick else {}) | given
    try:
        with progress_bars() as begin:
            summary = validate(ValidationSettings(**chosen, command=command), begin)
    except SpeContextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = summary.read_text(encoding="utf-8")
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)
    print(f"written to {summary.parent}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
