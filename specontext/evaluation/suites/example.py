"""What every suite hands to the runner: problems as plain text, and a scorer for the model's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Example:
    """One problem, in the words the model is given.

    Attributes:
        key: unique within (suite, task, length) and the same in every run, so that a run can be resumed and methods paired.
        prompt: the text the model is given, with the chat template already applied where one is used.
        references: the accepted answers.
        max_tokens: the most tokens the model may write.
        length: the asked length in tokens, None where a data set has lengths of its own.
        stop: texts that end the answer.
        details: whatever the task's scorer needs besides.
    """

    suite: str
    task: str
    key: str
    prompt: str
    references: tuple[str, ...]
    max_tokens: int
    length: int | None
    stop: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextTools:
    """A model's tokenizer, as suites see it.

    Attributes:
        count_tokens: the number of tokens of a text, without added special tokens.
        chat: a user message in the model's chat template with the generation prompt; the text itself where there is none.
        truncate_middle: at most so many tokens of a text, both ends kept and the middle cut out.
    """

    count_tokens: Callable[[str], int]
    chat: Callable[[str], str]
    truncate_middle: Callable[[str, int], str]


class EvalTask(Protocol):
    """A task of a suite: draws problems from a seed and scores answers."""

    @property
    def suite(self) -> str: ...

    @property
    def name(self) -> str: ...

    def examples(self, *, length: int | None, n: int, seed: int, text: TextTools) -> list[Example]:
        """The first `n` problems of `seed`, of at most `length` tokens with the answer's; None: the data's own lengths."""
        ...

    def score(self, example: Example, output: str) -> dict[str, float]:
        """`score` in 0..1, and whatever else is worth reporting beside it."""
        ...
