"""The generated suites: sizes, determinism, and scorers that know a right answer from a wrong one."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest

from specontext.evaluation.suites import SUITES, EvalTask, Example, TextTools
from specontext.evaluation.suites.generated import GeneratedTask, SuiteError, most_units
from specontext.evaluation.suites.matching import match_all, match_part, match_words
from specontext.evaluation.suites.reasoning_steps import StepsTask
from specontext.evaluation.suites.trained import TrainedTask
from specontext.evaluation.text_tools import prompt_ids, text_tools
from specontext.tasks import LengthError

WORDS = TextTools(
    lambda text: len(re.findall(r"\w+|[^\w\s]", text)),
    lambda text: f"[USER] {text} [MODEL]",
    lambda text, most: text[:most],
)


def tasks(kind: type) -> list[Any]:
    return [task for suite in ("ruler", "reasoning") for task in SUITES[suite]() if isinstance(task, kind)]


def name_of(task: EvalTask) -> str:
    return f"{task.suite}-{task.name}"


def answer_of(example: Example) -> str:
    """A right output."""
    return example.details.get("answer") or " and ".join(example.references)


def test_ruler_has_its_thirteen_tasks() -> None:
    names = [task.name for task in SUITES["ruler"]() if isinstance(task, GeneratedTask)]
    assert len(names) == len(set(names)) == 13


@pytest.mark.parametrize("length", (1024, 5000))
@pytest.mark.parametrize("task", tasks(GeneratedTask), ids=name_of)
def test_problems_of_any_tokenizer_fill_their_length(task: GeneratedTask, length: int) -> None:
    examples = task.examples(length=length, n=2, seed=3, text=WORDS)
    assert examples == task.examples(length=length, n=2, seed=3, text=WORDS)
    assert examples[:1] == task.examples(length=length, n=1, seed=3, text=WORDS)
    assert not {e.prompt for e in examples} & {e.prompt for e in task.examples(length=length, n=2, seed=4, text=WORDS)}
    assert len({example.key for example in examples}) == 2
    for example in examples:
        used = WORDS.count_tokens(example.prompt) + example.max_tokens
        assert 0.9 * length <= used <= length
        assert example.prompt.startswith("[USER] ") and "[MODEL]" in example.prompt
        assert (example.suite, example.task, example.length) == (task.suite, task.name, length)


@pytest.mark.parametrize("task", tasks(GeneratedTask), ids=name_of)
def test_right_and_wrong_answers(task: GeneratedTask) -> None:
    first, second = task.examples(length=2000, n=2, seed=0, text=WORDS)
    assert set(task.score(first, f"So:\n{answer_of(first)}.").values()) == {1.0}
    assert task.score(first, "")["score"] == 0
    assert task.score(first, answer_of(second))["score"] < 1
    assert WORDS.count_tokens(answer_of(first)) <= first.max_tokens


@pytest.mark.parametrize("task", [t for t in tasks(GeneratedTask) if not isinstance(t, StepsTask)], ids=name_of)
def test_the_prompt_holds_the_answers(task: GeneratedTask) -> None:
    (example,) = task.examples(length=2000, n=1, seed=1, text=WORDS)
    assert all(reference in example.prompt for reference in example.references)


def test_counts_of_the_aggregation_tasks() -> None:
    by_name = {task.name: task for task in SUITES["ruler"]()}
    (common,) = by_name["cwe"].examples(length=5000, n=1, seed=0, text=WORDS)
    listed = common.prompt.rpartition("appear most often.\n")[2].partition("\nQuestion")[0]
    counts = {word: listed.split().count(word) for word in set(listed.split()) if "-" in word}
    assert {word for word, count in counts.items() if count == 30} == set(common.references)
    assert set(counts.values()) == {30, 3}
    (coded,) = by_name["fwe"].examples(length=5000, n=1, seed=0, text=WORDS)
    words = re.findall(r"\b[a-z]{6}\b", coded.prompt.partition("coded words. ")[2].partition("\nQuestion")[0])
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert tuple(ranked[:3]) == coded.references
    assert len({words.count(word) for word in ranked[:4]}) == 4


def test_two_hops_need_both_documents() -> None:
    task = next(task for task in SUITES["ruler"]() if task.name == "qa_2")
    (example,) = task.examples(length=1500, n=1, seed=0, text=WORDS)
    documents = example.prompt.split("\n\nDocument ")
    place = re.search(r"of (\w+) born", example.prompt)
    assert place is not None
    first = next(d for d in documents if f"of {place[1]}\n" in d)
    assert example.references[0] not in first
    builder = re.search(r"built by ([\w ]+?) and", first)
    assert builder is not None
    assert any(builder[1] in d and example.references[0] in d for d in documents if d is not first)


@pytest.mark.parametrize("task", tasks(StepsTask), ids=name_of)
def test_steps_and_final_are_scored_apart(task: StepsTask) -> None:
    (example,) = task.examples(length=1200, n=1, seed=5, text=WORDS)
    *steps, final = example.details["answer"].split("\n")
    half = len(steps) // 2
    only_final = task.score(example, f"{chr(10).join(steps[:half])}\n{final}")
    assert only_final["final"] == only_final["score"] == 1
    assert only_final["steps"] == pytest.approx(half / len(steps))
    no_final = task.score(example, "\n".join(steps))
    assert no_final["steps"] == 1 and no_final["score"] == 0
    corrected = task.score(example, f"Step 1: nonsense\n{example.details['answer'].replace('Step', '- **Step')}")
    assert corrected["steps"] == corrected["final"] == 1


def test_the_ledger_adds_up() -> None:
    task = next(task for task in SUITES["reasoning"]() if task.name == "ledger")
    (example,) = task.examples(length=1500, n=1, seed=0, text=WORDS)
    balances = {name: int(value) for name, value in re.findall(r"^(A\d+): (\d+)$", example.prompt, re.MULTILINE)}
    for payer, amount, payee in re.findall(r"(A\d+) pays (\d+) to (A\d+)", example.prompt):
        balances[payer] -= int(amount)
        balances[payee] += int(amount)
        assert balances[payer] >= 0 and payer != payee
    asked = re.search(r"balance of (A\d+) as", example.prompt)
    assert asked is not None and example.references == (str(balances[asked[1]]),)


def test_the_walk_follows_the_table() -> None:
    task = next(task for task in SUITES["reasoning"]() if task.name == "pointers")
    (example,) = task.examples(length=1500, n=1, seed=0, text=WORDS)
    table = example.prompt.partition("arrows.\n\n")[2].partition("\n\nStart")[0]
    arrows = dict(row.split(" -> ") for row in table.split("\n"))
    start = re.search(r"Start at (\w+) and follow (\d+)", example.prompt)
    assert start is not None
    place = start[1]
    for _ in range(int(start[2])):
        place = arrows[place]
    assert example.references == (place,)


@pytest.mark.parametrize("task", tasks(TrainedTask), ids=name_of)
def test_trained_forms_are_scored_by_words(task: TrainedTask, tokenizer: Any) -> None:
    text = text_tools(tokenizer)
    first, second = task.examples(length=600, n=2, seed=0, text=text)
    assert text.count_tokens(first.prompt) < 600
    answer = first.details["answer"]
    assert set(task.score(first, f" {answer}").values()) == {1.0}
    wrong = task.score(first, second.details["answer"])
    assert wrong["score"] < 1 and wrong["exact"] == 0
    assert task.score(first, "")["score"] == 0


def test_a_program_whose_end_is_right_but_not_its_middle(tokenizer: Any) -> None:
    task = next(task for task in tasks(TrainedTask) if task.name == "program")
    (example,) = task.examples(length=600, n=1, seed=0, text=text_tools(tokenizer))
    lines = example.details["answer"].split(";")
    lines[2] = "after sun moon <- 1 + 1 : 1 + 1 : moon = 9"
    scores = task.score(example, ";".join(lines))
    assert scores["score"] == scores["final"] == 1
    assert scores["exact"] == 0 and 0 < scores["steps"] < 1


def test_a_model_s_vocabulary_decides_which_form_it_is_asked_in(tokenizer: Any) -> None:
    nano = text_tools(tokenizer)
    for suite, trained in (("ruler", 5), ("reasoning", 1)):
        for text, kind, count in ((nano, TrainedTask, trained), (WORDS, TrainedTask, None)):
            fit = [task for task in SUITES[suite]() if task.unfit(text) is None]
            names = [task.name for task in fit]
            assert len(names) == len(set(names))
            if text is nano:
                assert all(isinstance(task, kind) for task in fit) and len(fit) == count


def test_lengths_that_hold_no_problem() -> None:
    for task in tasks(GeneratedTask):
        with pytest.raises(LengthError, match="greater length"):
            task.examples(length=60, n=1, seed=0, text=WORDS)
        with pytest.raises(SuiteError, match="--lengths"):
            task.examples(length=None, n=1, seed=0, text=WORDS)


@pytest.mark.parametrize("suite", ("ruler", "reasoning"))
def test_generated_suites_take_no_data(suite: str) -> None:
    with pytest.raises(SuiteError, match="takes no data"):
        SUITES[suite](data="somewhere")


def test_metrics() -> None:
    assert match_all("It is LAMP and 12", ["lamp", "oak"]) == 0.5
    assert match_part("It is LAMP", ["lamp", "oak"]) == 1
    assert match_part("It is elm", ["lamp", "oak"]) == 0
    assert match_words("a lantern of 1234", ["ant", "lantern", "123", "1234"]) == 0.5


def test_most_units_never_gives_too_many() -> None:
    rng = random.Random(0)
    for _ in range(50):
        each, fixed, room = rng.uniform(0.5, 30), rng.randrange(50), rng.randrange(60, 3000)
        tokens = lambda n, each=each, fixed=fixed: fixed + int(n * each)  # noqa: E731
        least = 1
        if tokens(least) > room:
            continue
        found = most_units(tokens, room, least=least)
        assert tokens(found) <= room
        assert room - tokens(found) <= max(2 * each + 2, room / 100)


def test_text_tools(tokenizer: Any) -> None:
    text = text_tools(tokenizer)
    assert text.count_tokens(" sun has 3 lamp") == 4
    templated = text.chat("the sun")
    assert templated == "<|begin|><|user|>the sun<|assistant|>"
    assert prompt_ids(tokenizer, templated) == tokenizer.encode(templated, add_special_tokens=False)
    assert prompt_ids(tokenizer, " sun") == tokenizer.encode(" sun")
    other = copy.deepcopy(tokenizer)
    other.chat_template = "### User: {{ messages[0].content }}\n### Answer:"  # which wants no special token in front
    templated = text_tools(other).chat("the sun")
    assert prompt_ids(other, templated) == tokenizer.encode(templated, add_special_tokens=False)
    assert prompt_ids(other, " sun") == tokenizer.encode(" sun") != tokenizer.encode(" sun", add_special_tokens=False)
    long = " sun" * 10 + " lamp" * 10
    assert text.truncate_middle(long, 7) == " sun" * 3 + " lamp" * 4
    assert text.truncate_middle(long, 20) == long
