"""How long an engine takes to start beyond loading weights: with empty compiler caches, and in a process that finds them filled.

    python benchmarks/starts.py --model llama-3.1-8b [--requests 8] [--max-model-len 34816] [--profile DIR] [--json]

Every start is a process of its own: it makes the model (a public one's shape with random weights, or a checkpoint), then the
engine that `LLM` starts, warms it up as a server does before it says that it is ready, and answers one prompt. The first process
has empty caches of Triton and of torch.compile, the second one those that the first has left. Imports and loading count apart.
With --profile DIR the main thread is looked at 200 times a second: DIR gets the functions in which each start spends its time.
Python's own caches of bytecode should be there, as an installation leaves them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from types import CodeType

BEGAN = time.perf_counter()  # before the imports that take seconds
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
TARGETS = {"cold": 60.0, "warm": 15.0}
PROMPT = 1000  # tokens
OPTIONS = ("model", "device", "dtype", "budget", "requests", "max_model_len")


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    if options.start:
        print(json.dumps(start(options)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, name)) for name in CACHES}
        found = {kind: in_a_process(options, os.environ | caches, kind) for kind in TARGETS}
    print(f"| start | imports | loading | beyond loading (asked) | {PROMPT:,} tokens, first one |")
    print("|---|---|---|---|---|")
    for kind, took in found.items():
        parts = f"{took['import_s']:.1f} s | {took['load_s']:.1f} s | {took['start_s']:.1f} s ({TARGETS[kind]:.0f} s)"
        print(f"| {kind} | {parts} | {1000 * took['first_token_s']:.0f} ms |")
    if options.json:
        about = {"benchmark": "starts", "date": date.today().isoformat(), **{name: getattr(options, name) for name in OPTIONS}}
        print(json.dumps(about | found), flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-model-len", type=int, default=34816)
    parser.add_argument("--profile", type=Path, metavar="DIR", help="a directory: where the time of each start goes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)  # one start, in this process
    return parser.parse_args(words)


def in_a_process(options: argparse.Namespace, environment: dict[str, str], kind: str) -> dict[str, float]:
    """Seconds of one start."""
    profile = [] if options.profile is None else ["--profile", str(options.profile / f"{kind}.txt")]
    words = [word for name in OPTIONS for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    command = [sys.executable, __file__, "--start", *words, *profile]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"a start ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def start(options: argparse.Namespace) -> dict[str, float]:
    """Load, start, and answer once."""
    import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
    import torch
    from engine_runs import Setup, load
    from measure import clock

    device = torch.device(options.device)
    imported = clock(device)
    loaded, dummy = load(options.model, options.dtype, device)
    setup = Setup(loaded, dummy, options.budget, None, None, torch.Generator().manual_seed(0))
    began = clock(device)
    samples = None if options.profile is None else Samples()
    with setup.engine("speculative", seats=options.requests, longest=options.max_model_len) as driver:
        driver.engine.warm_up()
        ready = clock(device)
        if samples is not None:
            options.profile.parent.mkdir(parents=True, exist_ok=True)
            options.profile.write_text(samples.end(ready - began))
        first = driver.seconds([setup.prompt(min(PROMPT, options.max_model_len - 2))])
    return {"import_s": imported - BEGAN, "load_s": began - imported, "start_s": ready - began, "first_token_s": first}


@cache
def name_of(code: CodeType) -> str:
    return f"{'/'.join(Path(code.co_filename).parts[-3:])}:{code.co_firstlineno}({code.co_name})"


class Samples:
    """Where the main thread is, looked at by another. A profiler that follows calls would follow those of all threads."""

    EVERY = 0.005  # seconds

    def __init__(self) -> None:
        self._whole: Counter[str] = Counter()  # functions and those that they call
        self._alone: Counter[str] = Counter()
        self._count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(threading.main_thread().ident,), daemon=True)
        self._thread.start()

    def _look(self, main: int) -> None:
        while not self._ended.wait(self.EVERY):
            frame, names = sys._current_frames().get(main), []
            while frame is not None:
                names.append(name_of(frame.f_code))
                frame = frame.f_back
            if names:
                self._count += 1
                self._alone[names[0]] += 1
                self._whole.update(set(names))

    def end(self, seconds: float) -> str:
        """Seconds by function, of the seconds in all."""
        self._ended.set()
        self._thread.join()
        each = seconds / max(1, self._count)
        parts = ("with what they call", self._whole, 250), ("by themselves", self._alone, 60)
        lines = [f"{seconds:.1f} s, {self._count} samples"]
        for title, counts, most in parts:
            lines += ["", f"Functions {title}, seconds:"]
            lines += [f"{each * count:8.2f}  {name}" for name, count in counts.most_common(most)]
        return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
