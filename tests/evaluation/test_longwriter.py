"""LongWriter: requests as upstream writes them, the length score, and a judge behind HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from specontext.evaluation.run import run_evaluation
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.suites import SUITES, TextTools
from specontext.evaluation.suites.data_files import DataFileError
from specontext.evaluation.suites.longwriter import count_words, length_score
from specontext.evaluation.suites.longwriter_judge import DIMENSIONS, Judge, JudgeError, read_marks
from specontext.evaluation.text_tools import text_tools
from specontext.evaluation.traffic.http import HttpError

ROWS = [
    {"prompt": "Write a 100-word story about a red cat.", "type": "Literature and Creative Writing", "length": 100},
    {"prompt": "写一篇1000字的中国旅游指南", "type": "社区论坛", "length": 1000},
]
MARKS = dict(zip(DIMENSIONS, (5, 4, 3, 2, 1, 5), strict=True))
Reply = tuple[int, Any]  # status, and the completion's text or a whole body


class Endpoint:
    """An OpenAI-compatible server that gives the replies it was told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.asked.append((self.path, self.headers["authorization"], body))
                status, reply = endpoint.replies.pop(0)
                if isinstance(reply, str) and status == 200:
                    reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                elif isinstance(reply, str):
                    reply = {"error": {"message": reply}}
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> TextTools:
    return text_tools(tokenizer)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def judge_at(endpoint: Endpoint, **changes: Any) -> tuple[Judge, list[float]]:
    pauses: list[float] = []
    return replace(Judge.at(endpoint.url, "strict"), pause=pauses.append, **changes), pauses


def test_requests_of_each_file_are_a_task(tmp_path: Path, tokenizer: Any, text: TextTools) -> None:
    for name in ("longbench_write", "longwrite_ruler"):
        write(tmp_path / f"{name}.jsonl", ROWS)
    tasks = SUITES["longwriter"](str(tmp_path), max_length=4000)
    assert [task.name for task in tasks] == ["longbench_write", "longwrite_ruler"]
    examples = tasks[0].examples(length=None, n=9, seed=0, text=text)
    assert {example.prompt for example in examples} == {text.chat(row["prompt"]) for row in ROWS}
    assert all(3984 <= len(tokenizer(e.prompt)["input_ids"]) + e.max_tokens <= 4000 for e in examples)
    (task,) = SUITES["longwriter"](str(tmp_path / "longbench_write.jsonl"))
    assert {example.max_tokens for example in task.examples(length=None, n=9, seed=0, text=text)} == {32768}


@pytest.mark.parametrize(
    ("required", "written", "score"),
    [(100, 100, 1.0), (100, 250, 0.5), (100, 400, 0.0), (100, 900, 0.0), (100, 50, 0.5), (300, 100, 0.0), (100, 0, 0.0)],
)
def test_length_score(required: int, written: int, score: float) -> None:
    assert length_score(required, written) == pytest.approx(score)


def test_words_are_counted_in_both_scripts(tmp_path: Path, text: TextTools) -> None:
    assert count_words("Two words, and 3 numbers: don't!") == 6
    assert count_words("我们去 Beijing 。") == 4
    (task,) = SUITES["longwriter"](str(write(tmp_path / "a.jsonl", ROWS[:1])))
    (example,) = task.examples(length=None, n=1, seed=0, text=text)
    assert task.score(example, "word " * 50) == {"score": pytest.approx(0.5), "words": 50.0}


def test_a_judge_s_marks_stand_beside_the_length_score(
    tmp_path: Path, text: TextTools, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge, _ = judge_at(endpoint)
    assert "secret" not in repr(judge)
    (task,) = SUITES["longwriter"](str(write(tmp_path / "a.jsonl", ROWS[:1])), judge=judge)
    (example,) = task.examples(length=None, n=1, seed=0, text=text)
    endpoint.replies = [(200, json.dumps({"Analysis": "fine"} | MARKS))]
    scores = task.score(example, "word " * 100)
    assert scores["score"] == 1.0 and scores["judged"] == 1.0
    assert scores["quality"] == pytest.approx((20 / 6 - 1) / 4)
    assert scores["Relevance"] == 1.0 and scores["Breadth and Depth"] == 0.0
    ((path, key, body),) = endpoint.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "strict")
    said = body["messages"][0]["content"]
    assert ROWS[0]["prompt"] in said and "word word" in said and all(name in said for name in DIMENSIONS)


def test_it_is_asked_again_for_marks_that_are_not_complete(endpoint: Endpoint) -> None:
    judge, pauses = judge_at(endpoint)
    endpoint.replies = [(200, "I like it."), (200, json.dumps(MARKS | {"Clarity": 7})), (200, json.dumps(MARKS))]
    assert judge.marks("r", "t") == MARKS and not pauses
    judge, _ = judge_at(endpoint, tries=2)
    endpoint.replies = [(200, "No."), (200, "")]
    assert judge.marks("r", "t") is None


def test_it_waits_for_a_busy_server_and_names_one_that_refuses(endpoint: Endpoint) -> None:
    judge, pauses = judge_at(endpoint, tries=3)
    endpoint.replies = [(429, "slow down"), (503, "later"), (200, json.dumps(MARKS))]
    assert judge.marks("r", "t") == MARKS and pauses == [1.0, 2.0]
    endpoint.replies = [(500, "broken")] * 3
    with pytest.raises(JudgeError, match="the judge strict could not be asked: broken"):
        judge.marks("r", "t")
    endpoint.replies = [(401, "wrong key")]
    with pytest.raises(JudgeError, match="wrong key"):
        judge.marks("r", "t")
    endpoint.replies = [(200, {"object": "list"})]
    with pytest.raises(JudgeError, match="did not answer with a chat completion"):
        judge.marks("r", "t")
    assert not endpoint.replies
    with pytest.raises(HttpError, match="not a URL"):
        Judge.at("ftp://x", "m")


def test_a_text_that_the_judge_refuses_has_no_quality(tmp_path: Path, text: TextTools, endpoint: Endpoint) -> None:
    judge, _ = judge_at(endpoint)
    (task,) = SUITES["longwriter"](str(write(tmp_path / "a.jsonl", ROWS[:1])), judge=judge)
    (example,) = task.examples(length=None, n=1, seed=0, text=text)
    endpoint.replies = [(400, "This model's maximum context length is 8192 tokens")]
    assert task.score(example, "word " * 100) == {"score": 1.0, "words": 100.0, "judged": 0.0}


def test_a_judge_out_of_reach_is_named(endpoint: Endpoint) -> None:
    judge, pauses = judge_at(endpoint, tries=2)
    endpoint.server.server_close()
    with pytest.raises(JudgeError, match=r"cannot reach 127\.0\.0\.1"):
        judge.marks("r", "t")
    assert pauses == [1.0]


def test_a_judge_is_tried_before_anything_is_written_for_it(tmp_path: Path, endpoint: Endpoint) -> None:
    judge, _ = judge_at(endpoint)
    asked = EvaluationSettings(
        "nano",
        ("longwriter",),
        tmp_path / "out",
        methods=("full",),
        limit=1,
        data=str(write(tmp_path / "a.jsonl", ROWS[:1])),
        judge=judge,
        engine={"device": "cpu", "max_model_len": 128},
    )
    begun: list[str] = []

    def begin(phase: str, parts: int) -> Callable[[int], None]:
        begun.append(phase)
        return lambda done: None

    endpoint.replies = [(401, "no such key")]
    with pytest.raises(JudgeError, match="no such key"):
        run_evaluation(asked, begin)
    assert "answering" not in begun
    endpoint.replies = [(200, SIX), (200, SIX)]
    (row,) = run_evaluation(asked, begin)["rows"]
    assert row["scores"]["judged"] == 1 and "raining" in endpoint.asked[-2][2]["messages"][0]["content"]
    assert run_evaluation(asked, begin)["rows"] == [row]  # nobody is asked where nothing is missing


SIX = json.dumps(MARKS)


@pytest.mark.parametrize(
    "answer",
    [
        SIX,
        f"Here you are:\n```json\n{json.dumps(MARKS, indent=2)}\n```\nDone.",
        f"<think>perhaps {SIX.replace('5', '1')}</think>{SIX}",
        json.dumps({name.lower().replace(" ", "_"): str(mark) for name, mark in MARKS.items()}),
        json.dumps({name: f"{mark}/5" for name, mark in MARKS.items()}),
        json.dumps({name: {"score": mark, "reason": "so"} for name, mark in MARKS.items()}),
        '{"Analysis": "line\nbreak", ' + SIX[1:],
        '{"Analysis": "he said "no", Relevance: 2 at first", ' + SIX[1:],
        "\n".join(f"**{name}**: {mark}" for name, mark in MARKS.items()),
    ],
)
def test_marks_are_found_in_all_kinds_of_answers(answer: str) -> None:
    assert read_marks(answer) == MARKS


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{",
        "[" * 5000,
        json.dumps({name: mark for name, mark in MARKS.items() if name != "Accuracy"}),
        json.dumps(MARKS | {"Accuracy": 0}),
        json.dumps(MARKS | {"Accuracy": True}),
        json.dumps(MARKS | {"Accuracy": "4/10"}),
        *("\n".join(f"{name}: {mark}" for name in MARKS) for mark in ("10", "5.5", "4/10", "0")),
    ],
)
def test_incomplete_marks_are_none(answer: str) -> None:
    assert read_marks(answer) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "type": "t"}, "there is no field 'length'; the fields are prompt, type"),
        ({"prompt": "p", "type": "t", "length": 0}, "line 1 of .*a.jsonl: field 'length' must be at least 1, not 0"),
        ({"prompt": "", "type": "t", "length": 5}, "field 'prompt' is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: TextTools, row: dict[str, Any], message: str) -> None:
    (task,) = SUITES["longwriter"](str(write(tmp_path / "a.jsonl", [row])))
    with pytest.raises(DataFileError, match=message):
        task.examples(length=None, n=1, seed=0, text=text)


def test_it_needs_files() -> None:
    for data in (None, "THUDM/LongWriter"):
        with pytest.raises(DataFileError, match=r"needs --data: a file or directory of https://github.com/THUDM/LongWriter"):
            SUITES["longwriter"](data)
