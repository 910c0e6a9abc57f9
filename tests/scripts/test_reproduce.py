"""The one command for a big model: what it plans, that it goes on after a stop, what it does with what fails, and its report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specontext.distill.data import open_sources
from specontext.locations import NANO
from specontext.models.tokenizer_files import load_tokenizer
from tests.conftest import path_with
from tests.forked import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
H100 = ["--dry-run", "--gpu-memory", "80GiB", "--host-memory", "256GiB", "--bandwidth", "3TB/s", "--host-bandwidth", "50GB/s"]
H100 += ["--teraflops", "600"]
SAID = {"system": "Linux", "cores": 2, "machine": "2 CPU threads", "versions": {"torch": "2.13"}, "date": "2026-01-01"}
SAID |= {"host_memory_free": 1 << 34, "bandwidth": 1e10, "host_bandwidth": 1e10, "products": 1e11}


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


class Shell:
    """Stands for the commands that run: each writes what it would write, or fails.

    Attributes:
        ran: kinds of the commands, such as 'ruler-1024'.
        failing: a kind to what it says on its failure.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.words: list[list[str]] = []
        self.failing: dict[str, str] = {}

    def __call__(self, words: list[str], stdout: Any = None, **_: Any) -> Any:
        if words[1].endswith("reproduce_estimates.py"):
            return SimpleNamespace(returncode=0, stdout=json.dumps(SAID) + "\n")
        out = Path(words[words.index("-o") + 1]) if "-o" in words else Path()
        kind = "calibrate" if "calibrate" in words else words[words.index("prune") + 1] if "prune" in words else out.name
        self.ran.append(kind)
        self.words.append(words)
        if kind in self.failing:
            stdout.write(f"Traceback of something\nerror: {self.failing[kind]}\n")
            return SimpleNamespace(returncode=1)
        out.mkdir(parents=True, exist_ok=True)
        if kind == "validate":
            (out / "summary.md").write_text("# SpeContext on it\n\n## In short\n\n- fine\n")
        elif kind.startswith(("ruler", "longbench", "aime")):
            (out / "results.json").write_text(json.dumps({"meta": {"model": "m", "notes": []}, "rows": [row(kind)], "pairs": []}))
            (out / "report.md").write_text("")
        elif kind != "calibrate":
            shutil.copytree(NANO / "retrieval_head", out, dirs_exist_ok=True)
        return SimpleNamespace(returncode=0)


def row(kind: str) -> dict[str, Any]:
    suite, _, length = kind.partition("-")
    numbers = {"length": int(length) if length else None, "budget": None, "n": 2, "score": 0.5, "output_tokens": 77.0}
    return {"suite": suite, "task": "a", "method": "full"} | numbers


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    import reproduce_8b

    made = Shell()
    monkeypatch.setattr(reproduce_8b.subprocess, "run", made)
    return made


@pytest.fixture
def reproduce(shell: Shell, tmp_path: Path) -> Callable[..., int]:
    import reproduce_8b

    return lambda *words: reproduce_8b.main(["nano", "-o", str(tmp_path / "out"), "--lengths", "1024,4096", *words])


def test_the_plan_of_an_8b_model_is_made_from_its_shape_alone(capsys: pytest.CaptureFixture[str], shell: Shell) -> None:
    from reproduce_8b import main

    assert main(H100) == 0 and not shell.ran
    text = capsys.readouterr().out
    table = {line.split("  ")[0]: line for line in text.splitlines() if line.split("  ")[0] in ("ruler", "aime", "all")}
    assert " h " in table["ruler"] and "GiB" in table["all"] and "15.0 GiB" in table["ruler"]  # the model's files
    first = text.index(f"specontext head prune TanBaby/EAGLE3-LLaMA3.1-Instruct-8B-YARN-64K --target {LLAMA}")
    assert first < text.index("or specontext head prune yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    assert all(f"--suite ruler -o reproduction-Llama-3.1-8B-Instruct/ruler-{1024 << n}" in text for n in range(2, 8))
    assert main(["Qwen/Qwen3-8B", *H100]) == 0
    assert "without 65,536, 131,072: the model's contexts end at 40,960 tokens" in capsys.readouterr().out


def test_a_small_gpu_sends_kv_to_the_host_and_more_work_takes_longer(capsys: pytest.CaptureFixture[str], shell: Shell) -> None:
    from reproduce_8b import facts_of, measured, parse

    from reproduce_estimates import estimates
    from reproduce_parts import Plan

    def of(*words: str) -> tuple[Any, Any]:
        asked = parse([*H100, *words])
        facts = facts_of(asked.model, asked.dtype)
        machine, _ = measured(asked, facts)
        plan = Plan(asked, facts, machine.gpu_memory)
        return plan, estimates(plan, machine)

    plan, large = of()
    assert large["ruler"].seconds < 2 * of("--limit", "100")[1]["ruler"].seconds < 4.1 * large["ruler"].seconds
    assert of("--lengths", "4096")[1]["ruler"].seconds < large["ruler"].seconds / 10
    assert large["validate"].host > 0 and large["ruler"].gpu <= plan.gpu_memory
    assert of("--distill", "text")[1]["head"].gpu > large["head"].gpu
    plan, small = of("--gpu-memory", "24GiB")
    assert "KV goes to host memory" in small["ruler"].notes[0] and small["ruler"].host > 16 << 30
    offloaded = [step[0].words for step in plan.parts()[2].steps]
    assert [("--offload-layers" in words) for words in offloaded] == [False] * 4 + [True] * 2


def test_all_parts_run_once_and_are_passed_over_afterwards(
    reproduce: Callable[..., int], shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = ["validate", "ruler-1024", "ruler-4096", "longbench", "aime24", "aime25"]
    assert reproduce() == 0 and shell.ran == everything
    assert reproduce() == 0 and shell.ran == everything and "done before" in capsys.readouterr().out
    (tmp_path / "out" / "ruler-4096" / "results.json").unlink()  # what is gone is made again
    assert reproduce() == 0 and shell.ran == [*everything, "ruler-4096"]
    assert reproduce("--limit", "3", "--parts", "aime") == 0 and shell.ran[-2:] == ["aime24", "aime25"]  # another question


def test_what_fails_is_named_and_the_others_go_on(
    reproduce: Callable[..., int], shell: Shell, tmp_path: Path, capsys: Any
) -> None:
    shell.failing = {"ruler-1024": "out of memory", "longbench": "no network"}
    assert reproduce() == 1 and shell.ran[-2:] == ["aime24", "aime25"] and "ruler-4096" in shell.ran
    said = capsys.readouterr().err
    assert "ruler failed: out of memory" in said and "failed: ruler, longbench; the same command tries them again" in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert "**ruler failed.** out of memory" in report and "**longbench failed.** no network" in report
    shell.failing, shell.ran = {}, []
    assert reproduce() == 0 and shell.ran == ["ruler-1024", "longbench"]
    assert "failed" not in (tmp_path / "out" / "report.md").read_text()


def test_the_report_has_everything_in_it(reproduce: Callable[..., int], tmp_path: Path) -> None:
    assert reproduce("--parts", "validate,ruler,aime") == 0
    text, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    for said in ("2 cores", "torch 2.13", "suite ruler --retrieval-head", "Not asked for in the last run: head, longbench"):
        assert said.replace("suite ruler --retrieval-head", "--suite ruler") in text and said.split(" --")[0] in page
    assert "## SpeContext on it" in text and "SpeContext on it" in page  # the validation's own summary
    assert "77" in text and "4,096" in text and "reproduce_8b.sh nano" in text


def test_drafts_are_tried_in_turn_and_nothing_runs_without_a_head(shell: Shell, tmp_path: Path, capsys: Any) -> None:
    from reproduce_8b import main

    from specontext.retrieval.catalog import KNOWN_DRAFTS

    first, second, *others = KNOWN_DRAFTS[LLAMA]
    words = [LLAMA, "-o", str(tmp_path / "out"), "--parts", "head,aime"]
    shell.failing = {first: "404"}
    assert main(words) == 0 and shell.ran == [first, second, "calibrate", "aime24", "aime25"]
    assert str(tmp_path / "out" / "head") in shell.words[-1]
    shell.failing, shell.ran = {name: "404" for name in (first, second, *others)}, []
    shutil.rmtree(tmp_path / "out")
    assert main(words) == 1 and shell.ran == [first, second, *others]
    assert "aime: not run, since there is no retrieval head" in capsys.readouterr().err


def test_a_stopped_distillation_is_resumed(reproduce: Callable[..., int], shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "head"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_text("")
    assert reproduce("--distill", "text.txt", "--parts", "head") == 0
    assert shell.words[-1][-1] == "--resume" and "text.txt" in shell.words[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "chess"], "no part 'chess'"),
        (["--distill", "a", "--retrieval-head", "b"], "give one of them"),
        (["--gpu-memory", "80GiB"], "need all of its numbers"),
        ([word for word in H100 if word != "--dry-run"], "for --dry-run"),
    ],
)
def test_what_cannot_be_asked(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from reproduce_8b import main

    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_what_stops_everything_is_said_in_a_sentence(reproduce: Callable[..., int], shell: Shell, capsys: Any) -> None:
    from reproduce_8b import main

    assert main(["./nowhere"]) == 1 and capsys.readouterr().err.startswith("error: ")
    assert reproduce("--lengths", "99999") == 1 and "give shorter --lengths" in capsys.readouterr().err


def test_the_texts_that_are_taken_by_default_can_be_read() -> None:
    """A directory of documents must not hold rows that are no texts."""
    from reproduce_parts import TEXTS

    source = open_sources(list(TEXTS), tokenizer=load_tokenizer(str(NANO)), seed=0)
    for step in range(12):
        assert source.draw(step, 512, 2).ids.shape[0] == 2


@pytest.mark.slow
def test_the_script_takes_its_python_and_its_words() -> None:
    environment = path_with(ROOT) | {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([SCRIPTS / "reproduce_8b.sh", "--parts", "chess"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 2 and "no part 'chess'" in ran.stderr


@pytest.mark.slow
def test_the_parts_with_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Parts with real commands; that of validate has a test of its own."""
    import reproduce_8b

    monkeypatch.setattr(reproduce_8b, "subprocess", COMMANDS)
    bench = {"input": "who?", "context": "Ann is here. " * 30, "answers": ["Ann"], "length": 90, "dataset": "qasper"}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(bench | {"_id": "1", "all_classes": None, "language": "en"}) + "\n")
    words = ["nano", "--quick", "--device", "cpu", "-o", str(tmp_path / "out")]
    words += ["--parts", "head,ruler,longbench", "--longbench-data", str(tmp_path / "qasper.jsonl")]
    assert reproduce_8b.main(words) == 0, capfd.readouterr()
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(said in text for said in ("**ruler.**", "qasper", "This is a quick run"))
