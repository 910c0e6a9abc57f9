"""Where this project's judge of mathematical answers and the package math-verify differ, on the pairs of the tests.

    pip install math-verify && python scripts/compare_math_judges.py

Both judge every pair in both directions. For each kind it prints how many pairs each judges rightly, then the pairs of which
math-verify, or ours, says something else than the tests do; the last line is JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from specontext.evaluation.suites.math_answers import equivalent
from tests.evaluation.answer_pairs import DIFFERENT, SAME

Judge = Callable[[str, str], bool]


def math_verify_judge() -> Judge:
    """math-verify as its documentation uses it: both answers in boxes, the reference first."""
    from math_verify import parse, verify

    def judge(answer: str, reference: str) -> bool:
        sides = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer)]
        return bool(verify(*sides, timeout_seconds=None))

    return judge


def main() -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns of every timeout that is switched off
    judges = {"ours": equivalent, "math-verify": math_verify_judge()}
    totals = {"pairs": 0, **dict.fromkeys(judges, 0)}
    wrong: list[str] = []
    print(f"math-verify {version('math-verify')}; pairs judged rightly in both directions")
    for same, kinds in ((True, SAME), (False, DIFFERENT)):
        for kind, pairs in kinds.items():
            rightly = dict.fromkeys(judges, 0)
            for first, second in pairs:
                says = {name: {judge(first, second), judge(second, first)} for name, judge in judges.items()}
                for name, said in says.items():
                    rightly[name] += said == {same}
                    if said != {same}:
                        wrong.append(f"{name} on {'same' if same else 'different'} {kind}: {first}   |   {second}")
            totals["pairs"] += len(pairs)
            for name in judges:
                totals[name] += rightly[name]
            counts = "  ".join(f"{name} {rightly[name]:3}" for name in judges)
            print(f"{'same' if same else 'different':9}  {kind:18} {len(pairs):3} pairs  {counts}")
    print("\nWrongly judged:", *wrong, sep="\n  ")
    print(json.dumps({**totals, "version": version("math-verify")}))


if __name__ == "__main__":
    main()
