"""Reproduce what SpeContext claims with a large model, on this machine, with one command.

Usage: scripts/reproduce_8b.sh [MODEL] [-o DIR] [--parts head,validate,ruler,longbench,aime] [--limit N] [--dry-run]

MODEL is meta-llama/Llama-3.1-8B-Instruct by default; Qwen/Qwen3-8B, or any model or directory. One after another:
  head       a known EAGLE-3 draft of the model from the Hub, pruned and calibrated, or distillation on --distill DATA
  validate   scripts/validate_real_model: fidelity, a part of RULER, a long chain of thought, memory and time of a token
  ruler      RULER's thirteen tasks at 4K to 128K tokens
  longbench  LongBench
  aime       AIME 2024 and 2025, with the lengths of the answers

What will run, and how long it takes and how much memory at least, is printed first; --dry-run stops there. Every command is
printed and can be run by itself. A stopped run goes on when it is started again with the same DIR: what is done is passed
over. A part that fails is named and the others go on. In the end DIR/report.md and DIR/report.html can be posted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reproduce_estimates import Machine, estimates, shown
from reproduce_parts import (
    AIME_LENGTH,
    DISTILL_LENGTH,
    DISTILL_STEPS,
    DISTILL_TOKENS,
    LENGTHS,
    PARTS,
    REPOSITORY,
    TEXTS,
    VALIDATE,
    Command,
    Part,
    Plan,
)
from reproduce_report import write
from specontext.cli.named_model import find_facts
from specontext.cli.options import parse_bandwidth, parse_size
from specontext.errors import SpeContextError
from specontext.memory.facts import ModelFacts
from specontext.memory.presets import PRESETS
from specontext.memory.speed import Bandwidths

QUICK: dict[str, Any] = {
    "limit": 1,
    "lengths": (1024,),
    "budgets": (256,),
    "chain_tokens": 1024,
    "distill_length": 1024,
    "distill_steps": 20,
    "distill_tokens": 2048,
}
FLOORS = """
Times are floors: bytes and operations of the model's shape over what the machine reaches. Loading, choosing and waiting come on
top; measured steps of an 8B shape took 1.3 to 1.5 times their floor. Disk has the model's own files in it.
"""
SHARE = 0.9  # of the GPU's memory, as the engine takes it


def words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in words(text)}))


def parts(text: str) -> tuple[str, ...]:
    if unknown := [name for name in words(text) if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part '{unknown[0]}': choose among {', '.join(PARTS)}")
    return words(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("reproduce_8b.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="meta-llama/Llama-3.1-8B-Instruct", help="a Hub id, a checkpoint directory, smollm2 or nano")
    add("-o", "--out", type=Path, help="default: reproduction-NAME")
    add("--parts", type=parts, default=PARTS, help=f"of {', '.join(PARTS)}; default all")
    add("--dry-run", action="store_true", help="print what would run and what it takes, and stop")
    add("--quick", action="store_true", help="minutes, to see whether everything works here: numbers that say little")
    add("--limit", type=int, help="problems of each task and length; default 50 of RULER and LongBench, all of AIME")
    add("--lengths", type=numbers, help="contexts of RULER and validate; default 4K to 128K")
    add("--budgets", type=numbers, help="KV entries that are read; default 1024,2048")
    add("--methods", type=words, default=("full", "speculative", "quest", "streaming"), help="of the evaluations")
    add("--retrieval-head", help="take this head or draft, directory or Hub id, as it is")
    add("--distill", action="append", metavar="DATA", help="train the head on this text, as of specontext distill; repeatable")
    add("--distill-steps", type=int, help=f"default {DISTILL_STEPS}")
    add("--distill-tokens", type=int, help=f"of a step; default {DISTILL_TOKENS}")
    add("--distill-length", type=int, help=f"longest sequences in tokens; default {DISTILL_LENGTH}")
    add(
        "--text",
        action="append",
        help="of fidelity and calibration, as of specontext eval; default: this project's docs and code",
    )
    add("--chain-tokens", type=int, help=f"of an AIME prompt and its answer; default {AIME_LENGTH}")
    add("--longbench-data", help="a path in place of the Hub's")
    add("--aime24-data", help="a path in place of the Hub's")
    add("--aime25-data", help="a path in place of the Hub's")
    add("--device", default="auto")
    add("--dtype", default="auto")
    machine = parser.add_argument_group("estimates for another machine than this one; all of them, or none")
    machine.add_argument("--gpu-memory", type=parse_size, help="such as 80GiB")
    machine.add_argument("--host-memory", type=parse_size, help="such as 256GiB")
    machine.add_argument("--bandwidth", type=parse_bandwidth, help="of the GPU's memory, such as 3.1TB/s")
    machine.add_argument("--host-bandwidth", type=parse_bandwidth, help="from the host to the GPU, such as 50GB/s")
    machine.add_argument("--teraflops", type=float, help="of matrix products, such as 600")
    asked = parser.parse_args(arguments)
    if asked.distill and asked.retrieval_head:
        parser.error("--distill makes a head and --retrieval-head names one: give one of them")
    full = {"lengths": LENGTHS, "budgets": (1024, 2048), "chain_tokens": AIME_LENGTH}
    full |= {
        "distill_length": DISTILL_LENGTH,
        "distill_steps": DISTILL_STEPS,
        "distill_tokens": DISTILL_TOKENS,
        "text": list(TEXTS),
    }
    for name, value in (full | (QUICK if asked.quick else {})).items():
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    asked.out = asked.out or Path(f"reproduction-{Path(asked.model).name}")
    told = [asked.gpu_memory, asked.host_memory, asked.bandwidth, asked.host_bandwidth, asked.teraflops]
    if None in told and any(told):
        parser.error("estimates for another machine need all of its numbers: see --help")
    asked.told = all(told)
    if asked.told and not asked.dry_run:
        parser.error("another machine's numbers are for --dry-run: what runs here is planned for this machine")
    return asked


def facts_of(model: str, dtype: str) -> ModelFacts:
    """The model's shape; of the public models that are known without a download or a network."""
    preset = next((preset for preset in PRESETS.values() if preset.source == model), None)
    return find_facts(preset.name if preset is not None else model, dtype)


def measured(asked: argparse.Namespace, facts: ModelFacts) -> tuple[Machine, dict[str, Any]]:
    """What is known of the machine, in numbers and in words."""
    if asked.told:
        speed = Bandwidths(asked.bandwidth, asked.host_bandwidth)
        said = {"told": f"another machine: {asked.gpu_memory / 2**30:.0f} GiB of GPU memory"}
        return Machine(speed, asked.teraflops * 1e12, int(SHARE * asked.gpu_memory), asked.host_memory), said
    dtype = str(facts.shape.dtype).removeprefix("torch.")
    script = str(Path(__file__).with_name("reproduce_estimates.py"))
    made = subprocess.run([sys.executable, script, asked.device, dtype], capture_output=True, text=True)
    if made.returncode:
        raise SpeContextError(f"this machine cannot be measured: {last_error(made.stderr)}")
    found = json.loads(made.stdout.splitlines()[-1])
    memory = int(SHARE * found["gpu_memory"]) if "gpu_memory" in found else found["host_memory_free"]
    speed = Bandwidths(found["bandwidth"], found["host_bandwidth"])
    return Machine(speed, found["products"], memory, found["host_memory_free"]), found


def announce(plan: Plan, machine: Machine, said: dict[str, Any]) -> None:
    """What will run, and what it takes."""
    where = said.get("told") or said.get("gpu") or said["machine"]
    speed = f"{machine.speed.device / 1e9:,.0f} GB/s of memory, {machine.products / 1e12:,.2f} TFLOP/s of products"
    print(f"{plan.asked.model} on {where} ({speed}), into {plan.asked.out}\n")
    table = [("part", "at least", "GPU memory", "host memory", "disk", ""), *shown(estimates(plan, machine))]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    for row in table:
        cells = (
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        print("  ".join((*cells, row[5])).rstrip())
    print(FLOORS)
    for part in plan.parts():
        print(f"{part.name}: {' '.join(part.notes)}".rstrip())
        for step in part.steps:
            for number, command in enumerate(step):
                print(f"  {'or ' if number else ''}{command}")
    print(flush=True)


def run_part(part: Part, state: dict[str, Any], save: Any, logs: Path) -> bool:
    """Run what is not done yet; whether all of it is done now. A step that fails does not keep the next ones from running."""
    done = True
    for number, step in enumerate(part.steps):
        if part.name == "head" and not done:
            break  # there is nothing to calibrate
        done &= any(_run(part.name, command, state, save, logs / f"{part.name}-{number}.log") for command in step)
    return done


def _run(part: str, command: Command, state: dict[str, Any], save: Any, log: Path) -> bool:
    known = state.get(str(command), {})
    if known.get("status") == "done" and all(file.exists() for file in command.results):
        print(f"{part}: done before: {command}", flush=True)
        return True
    added = command.resume if command.unfinished is not None and command.unfinished.exists() else ()
    print(f"{part}: {command}{' ' if added else ''}{shlex.join(added)}\n  its output: {log}", flush=True)
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        status = subprocess.run(as_run((*command.words, *added)), stdout=stream, stderr=subprocess.STDOUT).returncode
    seconds = known.get("seconds", 0.0) + time.monotonic() - began
    missing = [str(file) for file in command.results if not file.exists()]
    why = last_error(log.read_text(errors="replace")) if status else f"it wrote no {', '.join(missing)}" if missing else None
    state[str(command)] = {"part": part, "status": "failed" if why else "done", "seconds": seconds, "error": why}
    save()
    if why:
        print(f"{part} failed: {why}", file=sys.stderr, flush=True)
    return why is None


def as_run(said: tuple[str, ...]) -> list[str]:
    """The command with this Python, wherever its scripts lie."""
    if said[0] == VALIDATE:
        return [sys.executable, str(REPOSITORY / f"{VALIDATE}.py"), *said[1:]]
    return [sys.executable, "-m", "specontext.cli", *said[1:]]


def last_error(text: str) -> str:
    """What a command said of its failure."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error:")]
    return (said or lines or ["it said nothing"])[-1].removeprefix("error: ")


def run(asked: argparse.Namespace, command: str) -> int:
    facts = facts_of(asked.model, asked.dtype)
    machine, said = measured(asked, facts)
    plan = Plan(asked, facts, machine.gpu_memory)
    if not plan.lengths:
        raise SpeContextError(f"the model's contexts end at {facts.shape.max_position} tokens: give shorter --lengths")
    announce(plan, machine, said)
    if asked.dry_run:
        return 0
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "state.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"commands": {}}
    kept |= {"machine": said, "command": command, "model": asked.model, "quick": asked.quick}

    def save() -> None:
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        draft.replace(file)

    failed: list[str] = []
    for part in plan.parts():
        if "head" in failed:
            print(f"{part.name}: not run, since there is no retrieval head", file=sys.stderr, flush=True)
            failed.append(part.name)
        elif not run_part(part, kept["commands"], save, asked.out / "logs"):
            failed.append(part.name)
        kept["failed"] = failed
        save()
        write(asked.out, plan, kept)
    print(f"report: {asked.out / 'report.md'}, {asked.out / 'report.html'}")
    if failed:
        print(f"failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    try:
        return run(asked, shlex.join(["scripts/reproduce_8b.sh", *arguments]))
    except (SpeContextError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
