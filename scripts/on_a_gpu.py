"""Run every verb of the command line once on a device, and say what worked: what tests on a CPU cannot tell of a GPU.

    python scripts/on_a_gpu.py OUT [--device cuda] [--only serve,eval]

Each command is a process of its own with the bundled model and small settings. OUT gets what each printed and `table.md`, which
docs/gpu.md quotes. The exit status is 1 where a command failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import torch
import transformers

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "specontext.cli"]
PORT = 8477


def commands(out: Path, device: str) -> dict[str, list[str]]:
    """The commands by name; words that begin with a verb of specontext's own."""
    on = ["--device", device]
    small = ["--suite", "ruler", "--tasks", "niah_single", "--lengths", "1024", "--limit", "4"]
    every = "full,speculative,oracle,quest,snapkv,shadowkv,clusterkv,h2o,streaming,random"
    head, fidelity = str(out / "head"), ["--text", "README.md", "--lengths", "1024", "--limit", "2", "--compare", "16"]
    return {
        "generate": ["generate", "nano", "--prompt", "apple = 417.\nQuestion: apple?\nAnswer:", "--json", *on],
        "generate, offloaded": [
            "generate",
            "nano",
            "--prompt-file",
            "README.md",
            "--offload-layers",
            "-1",
            "--budget",
            "128",
            *on,
        ],
        "generate, bfloat16": ["generate", "nano", "--prompt-file", "README.md", "--dtype", "bfloat16", *on],
        "eval ruler, all methods": [
            "eval",
            "nano",
            *small,
            "--methods",
            every,
            "--budgets",
            "128",
            "-o",
            str(out / "ruler"),
            *on,
        ],
        "eval fidelity": ["eval", "nano", "--suite", "fidelity", *fidelity, "--budgets", "128", "-o", str(out / "fidelity"), *on],
        "report": ["report", str(out / "ruler")],
        "head info": ["head", "info", "nano"],
        "distill": ["distill", "nano", "-o", head, "--data", "tasks", "--steps", "4", "--length", "512", *on],
        "head calibrate": ["head", "calibrate", head, "--target", "nano", "--text", "tasks", "-o", str(out / "mapped"), *on],
        "head analyze": [
            "head",
            "analyze",
            "nano",
            "--target",
            "nano",
            "--text",
            "tasks",
            "--sequences",
            "1",
            "-o",
            str(out / "a"),
            *on,
        ],
        "plan": ["plan", "llama-3.1-8b", "--gpu-memory", "24GiB"],
        "demo": ["demo", "--problems", "1"],
    }


def benchmarks(device: str) -> dict[str, list[str]]:
    """Benchmarks in small, as paths and options."""
    shape = ["--device", device, "--model", "qwen3-0.6b", "--context", "2048", "--budget", "256", "--json"]
    return {"benchmarks/decode.py": ["benchmarks/decode.py", *shape]}


def finished(words: Sequence[str], log: Path) -> str:
    """Run a command to its end; '' where it worked, else the last line that it printed."""
    with log.open("w") as file:
        code = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return "" if code == 0 else f"exit {code}: {lines[-1][:160]}"


def served(device: str, log: Path) -> str:
    """Start a server, ask it, load it with `bench serve`, and end it."""
    with log.open("w") as file:
        server = subprocess.Popen(
            [*CLI, "serve", "nano", "--port", str(PORT), "--device", device], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60, trust_env=False) as client:
                until = time.monotonic() + 180
                while True:
                    try:
                        client.get("/health").raise_for_status()
                        break
                    except httpx.HTTPError:
                        if server.poll() is not None or time.monotonic() > until:
                            return "the server did not become ready"
                        time.sleep(0.5)
                body = {"messages": [{"role": "user", "content": "apple = 417.\nQuestion: apple?\nAnswer:"}], "max_tokens": 8}
                client.post("/v1/chat/completions", json=body).raise_for_status()
            load = ["bench", "serve", "--base-url", f"http://127.0.0.1:{PORT}", "--num-prompts", "8"]
            return finished([*CLI, *load], log.with_suffix(".bench.txt"))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", help="names of commands, with commas")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    jobs: dict[str, Callable[[Path], str]] = {
        name: lambda log, words=words: finished([*CLI, *words], log) for name, words in commands(asked.out, asked.device).items()
    }
    jobs |= {
        name: lambda log, words=words: finished([sys.executable, *words], log) for name, words in benchmarks(asked.device).items()
    }
    jobs["serve, chat, bench serve"] = lambda log: served(asked.device, log)
    wanted = (
        set(jobs) if asked.only is None else {name for name in jobs if name.split(",")[0].split()[0] in asked.only.split(",")}
    )
    machine = torch.cuda.get_device_name() if asked.device.startswith("cuda") else "CPU"
    rows = [f"{machine}, {datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}", ""]
    rows += ["| command | seconds | outcome |", "|---|---|---|"]
    failed = 0
    for number, name in enumerate(name for name in jobs if name in wanted):
        began = time.monotonic()
        trouble = jobs[name](asked.out / f"{number:02}.txt")
        failed += bool(trouble)
        rows.append(f"| {name} | {time.monotonic() - began:.0f} | {trouble or 'ok'} |")
        print(rows[-1], flush=True)
        (asked.out / "table.md").write_text("\n".join(rows) + "\n")
    print(json.dumps({"commands": len(wanted), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
