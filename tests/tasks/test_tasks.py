"""Generated tasks: fair, reproducible, as long as asked for, and solved here from the prompt alone."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext.evaluation.token_counter import token_counter
from specontext.tasks import TASKS, LengthError, Problem, correct_steps, get_task, sample_problems
from specontext.tasks.problem import TokenCounter
from specontext.tasks.words import vocabulary

HAYSTACKS = [name for name in TASKS if name != "program"]
LENGTHS = (400, 1000, 4096)


@pytest.fixture(scope="module")
def count() -> TokenCounter:
    return token_counter("nano")


def solve_retrieval(prompt: str) -> str:
    """Look the asked keys up in the text."""
    text, question = prompt.rsplit("\nQuestion:", 1)
    facts = dict(re.findall(r" (\w+) = ([\d, ]+)\.", text))
    keys = question.removesuffix("?\nAnswer:").split()
    return " ".join(f"{key} = {facts[key]}." for key in keys)


def solve_tracking(prompt: str) -> str:
    """Run the assignments and list the variables with the value, in order."""
    text, question = prompt.rsplit("\nQuestion:", 1)
    wanted = re.fullmatch(r" which variables have the value (\d+)\?\nAnswer:", question)
    assert wanted is not None
    values: dict[str, str] = {}
    for name, source in re.findall(r" VAR (\w+) = (\w+)\.", text):
        values[name] = values.get(source, source)
    return " ".join(name for name, value in values.items() if value == wanted[1]) + "."


def solve_program(prompt: str) -> str:
    """Evaluate the program with Python, writing out every line."""
    source = prompt.removeprefix("Run this program modulo 7.\n").removesuffix("\nRun:")
    values: dict[str, int] = {}
    worked = []
    for line in source.strip().rstrip(";").split(";"):
        opening, expression = (part.strip() for part in line.split("<-"))
        target = opening.split()[-1]
        filled = re.sub(r"[a-z]+", lambda name: str(values[name[0]]), expression)
        values[target] = eval(filled) % 7
        worked.append(f"{opening} <- {expression} : {filled} : {target} = {values[target]};")
    return " ".join(worked)


SOLVERS = {name: solve_retrieval for name in HAYSTACKS} | {"variable_tracking": solve_tracking, "program": solve_program}


def draw(name: str, length: int, count: TokenCounter, *, seed: int = 7, n: int = 5) -> list[Problem]:
    return sample_problems(name, length=length, seed=seed, n=n, count_tokens=count)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", list(TASKS))
def test_answers_follow_from_the_prompt(name: str, length: int, count: TokenCounter) -> None:
    for problem in draw(name, length, count):
        assert problem.task == name
        assert problem.answer == SOLVERS[name](problem.prompt)
        assert problem.solved_by(f" {problem.answer}") and not problem.solved_by(problem.answer[:-2])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", list(TASKS))
def test_length_is_counted_and_kept(name: str, length: int, count: TokenCounter) -> None:
    for problem in draw(name, length, count):
        assert problem.length == count(f"{problem.prompt} {problem.answer}") <= length
        assert name == "program" or problem.length >= 0.95 * length


@pytest.mark.parametrize("name", list(TASKS))
def test_the_seed_decides(name: str, count: TokenCounter) -> None:
    problems = draw(name, 400, count)
    random.seed(0)  # nothing may come from the shared generator
    assert problems == draw(name, 400, count)
    assert len({problem.prompt for problem in problems}) == len(problems)
    assert not {p.prompt for p in problems} & {p.prompt for p in draw(name, 400, count, seed=8)}
    assert draw(name, 400, count, n=2) == problems[:2]


def test_long_reasoning_writes_at_least_512_tokens(count: TokenCounter) -> None:
    for problem in draw("program", 1024, count):
        assert count(f" {problem.answer}") >= 512


@pytest.mark.parametrize("name", list(TASKS))
def test_a_length_that_cannot_hold_the_task_is_refused(name: str, count: TokenCounter) -> None:
    with pytest.raises(LengthError, match=r"length|tokens"):
        draw(name, 12, count)


def test_unknown_tasks_and_counts_are_refused(count: TokenCounter) -> None:
    with pytest.raises(ValueError, match="niah_single"):
        get_task("crossword")
    with pytest.raises(ValueError, match="at least 1"):
        draw("program", 400, count, n=0)


def test_steps_are_scored_in_place(count: TokenCounter) -> None:
    (problem,) = draw("program", 400, count, n=1)
    lines = problem.answer.split(";")[:-1]
    assert correct_steps(problem, f" {problem.answer} more; text") == 1
    assert correct_steps(problem, "") == 0
    assert correct_steps(problem, ";".join([*lines[:-1], " wrong"])) == pytest.approx(1 - 1 / len(lines))
    assert correct_steps(problem, "extra;" + problem.answer) == 0


def test_every_task_word_is_one_token(tokenizer: Any) -> None:
    assert [word for word in vocabulary() if len(tokenizer.tokenize(word)) != 1] == []


@given(text=st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_the_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|begin|><|user|>one<|assistant|>two<|end|><|user|>three<|assistant|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1
