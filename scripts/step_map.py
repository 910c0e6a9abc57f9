"""Which files and functions of ours one decode step of the bundled model goes through, and how often it changes file.

    python scripts/step_map.py [--method speculative] [--json]

The step is that of one request with all layers offloaded, from `LLMEngine.step` to the token that comes out of it. Functions are
those of `specontext/`, methods and properties among them; comprehensions and lambdas count with the function around them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import specontext
from specontext import LLM, SamplingParams, SpeContextConfig

PACKAGE = Path(specontext.__file__).parent
PROMPT = [4 + 7 * i % 900 for i in range(200)]
WARM_UP = 3  # steps: the prompt, and some after it


@dataclass(frozen=True)
class StepMap:
    """One step.

    Attributes:
        files: of ours in the order in which they are first reached, with their functions in the same order.
        calls: of functions of ours.
        changes: calls from a file of ours into another one, whatever lies between.
    """

    files: dict[str, list[str]]
    calls: int
    changes: int

    @property
    def functions(self) -> int:
        return sum(len(names) for names in self.files.values())


class _Watcher:
    """Sees every call, for `sys.setprofile`."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}
        self.calls = self.changes = 0
        self._path: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return") or not _ours(frame):
            return
        file = str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
        if event == "return":
            if self._path:  # else it was called before the watch began
                self._path.pop()
            return
        name = frame.f_code.co_qualname.replace("<locals>.", "")
        names = self.files.setdefault(file, [])
        if name not in names:
            names.append(name)
        self.calls += 1
        self.changes += bool(self._path) and self._path[-1] != file
        self._path.append(file)


def _ours(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.startswith(f"{PACKAGE}/") and not code.co_name.startswith("<")


def map_step(method: str = "speculative", **options: Any) -> StepMap:
    """The map of one decode step of the bundled model."""
    config = SpeContextConfig(method=method, budget=None if method == "full" else 64, offload_layers=-1)
    llm = LLM("nano", config=config, device="cpu", max_model_len=1024, **options)
    engine = llm.engine
    engine.add_request("mapped", PROMPT, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    for _ in range(WARM_UP):
        engine.step()
    watcher = _Watcher()
    sys.setprofile(watcher)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    engine.close()
    return StepMap(watcher.files, watcher.calls, watcher.changes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Files and functions of ours that one decode step goes through.")
    parser.add_argument("--method", default="speculative")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = map_step(args.method)
    numbers = {"files": len(found.files), "functions": found.functions, "calls": found.calls, "changes": found.changes}
    if args.json:
        print(json.dumps(numbers | {"map": asdict(found)["files"]}))
        return
    for file, names in found.files.items():
        print(f"{file}: {', '.join(names)}")
    print("{files} files, {functions} functions, {changes} changes of file in {calls} calls".format(**numbers))


if __name__ == "__main__":
    main()
