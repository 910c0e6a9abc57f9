"""Answers to mathematics problems are compared by value, whatever their spelling."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specontext.evaluation.suites.math_answers import equivalent, exact_number, final_answer
from specontext.evaluation.suites.math_values import Unreadable, proportion, value
from tests.evaluation.answer_pairs import DIFFERENT, SAME

SEPARATORS = (",", "{,}", r",\!", r",\! ", r"{,}\!", r"\,", r"\;", r"\ ", "~", " ", "\u202f", "'", ", ")


@pytest.mark.parametrize("kind", SAME)
def test_the_same_value_in_other_words(kind: str) -> None:
    missed = [(a, b) for a, b in SAME[kind] if not (equivalent(a, b) and equivalent(b, a))]
    assert not missed


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_values(kind: str) -> None:
    taken = [(a, b) for a, b in DIFFERENT[kind] if equivalent(a, b) or equivalent(b, a)]
    assert not taken


def test_every_answer_is_itself_in_any_wrapping() -> None:
    answers = {answer for pairs in SAME.values() for pair in pairs for answer in pair}
    for wrapping in ("{}", "${}$", "\\boxed{{{}}}", " {} "):
        assert not [answer for answer in answers if not equivalent(wrapping.format(answer), answer)], wrapping


def test_answers_of_different_kinds_are_different() -> None:
    """One answer of each kind, against all others."""
    ones = [
        "7",
        r"\frac{1}{7}",
        "(1,7)",
        "[1,7]",
        "1, 7",
        r"\{1,7,8\}",
        r"\sqrt{7}",
        "7i",
        "x^7",
        "x > 7",
        "7_8",
        "x^2=y^7",
        r"\sin 7",
    ]
    assert not [(a, b) for n, a in enumerate(ones) for b in ones[:n] if equivalent(a, b)]


@given(st.fractions(), st.fractions())
def test_fractions_are_equal_where_their_numbers_are(first: Fraction, second: Fraction) -> None:
    written = rf"\frac{{{first.numerator}}}{{{first.denominator}}}"
    assert exact_number(written) == first
    assert equivalent(written, f"{second.numerator}/{second.denominator}") == (first == second)


@given(
    st.integers(1000, 10**15),
    st.sampled_from([",", "{,}", r",\!", r",\! ", r"{,}\!", r"\,", r"\;", r"\ ", "~", " ", "\u202f", "'", ", "]),
)
def test_thousands_may_be_separated_in_any_way(number: int, separator: str) -> None:
    written = f"{number:,}".replace(",", separator)
    assert equivalent(written, str(number)) and equivalent(written, f"{number:,}")
    assert not equivalent(written, str(number + 1)) and not equivalent(written, f"{number // 10}")


@given(st.text(alphabet=r"0123456789.,/+-*^(){}[]\ xyie&_$%=<>|!:;~" + "π√±", max_size=40))
def test_any_answer_can_be_compared(answer: str) -> None:
    nothing = re.sub(r"\\[>!]", "", answer).strip(" $%\\.{}[]()*,;:~_^&") == ""  # spaces of LaTeX's, as those of other signs
    assert equivalent(answer, answer) or nothing
    equivalent(answer, r"\frac{1}{2}")


@pytest.mark.parametrize(
    "formula",
    ["9^{9^{9}}", "(" * 100 + "1" + ")" * 100, "1/0", "", "2 3", r"\foo x", "x" * 1001, r"\sqrt[x]{2}", "(-1)!", "201!"],
)
def test_formulas_without_a_value_are_refused(formula: str) -> None:
    with pytest.raises(Unreadable):
        value(formula)


@pytest.mark.parametrize("large", ["1e999", "9" * 390, r"10^{400}", "i9^{323}9^{323}", r"\frac{1}{2}1e999\binom{5}{2}"])
@pytest.mark.parametrize("other", ["x^2+1", r"\sqrt{2}", "x=2", "(1,i)", r"\pi", "3:4", "[0,1)", "i"])
def test_numbers_that_no_machine_counts_are_answers_as_any_other(large: str, other: str) -> None:
    assert not equivalent(large, other) and not equivalent(other, large)
    assert not equivalent(f"x={large}", other) and not equivalent(other, f"({large},i)")


def test_an_output_that_opens_boxes_to_its_end_is_read_at_once() -> None:
    assert final_answer("\\boxed{" * 50_000) is None
    assert final_answer("\\boxed{7}" + "\\boxed{" * 50_000) == "7"
    assert final_answer("\\boxed{" * 50_000 + "7" + "}" * 50_000) is not None


SAID = [
    ("The answer is: 5\n\nTo check it: the answer is easy to verify.", "5"),
    ("Therefore, the answer is $x=3$ or $x=4$.", "3, 4"),
    (r"Answer: \(1\), \(2\) and \(3\)", "1, 2, 3"),
    ("The answer is $5$ and not $6$", "5"),
    ("The answer is `42`.", "42"),
    ('The answer is "42".', "42"),
    ("The answer is 5. On reflection, the answer is 6.", "6"),
    ("The answer is blue. No, the answer is red.", "red"),
    ("The answer is 7, so the answer is B.", "B"),
    ("<think>2 + 3</think>\n<answer> 5 </answer>", "5"),
    ("<answer>\n5\n</answer>", "5"),
    ("**Final Answer**\n\n$12$", "12"),
    ("## Final answer:\n**12**", "12"),
    ("The final answer is 12.", "12"),
]


@pytest.mark.parametrize(("output", "right"), SAID)
def test_what_is_said_without_a_box(output: str, right: str) -> None:
    assert equivalent(final_answer(output) or "", right)


def test_proportions() -> None:
    assert proportion("2x+4y", "x+2y") == pytest.approx(2)
    assert proportion("x-y", "y-x") == pytest.approx(-1)
    assert proportion("x+y", "x-y") == 0 and proportion("2", "3") is None and proportion("x", r"\foo") is None
