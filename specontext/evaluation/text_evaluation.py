"""What the suites `fidelity` and `continuation` share: windows of the user's texts, and full attention, which all methods are
compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from specontext.evaluation.competitors import Choice, Competitor
from specontext.evaluation.run import Begin, Evaluation
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.windows import ShortTextError, Window, reservations
from specontext.retrieval.registry import FULL

LENGTH = 4096  # of windows, and what is written after them, where none was asked for
SHORTEST = 16
REFERENCE: Choice = (Competitor(FULL, FULL), None)


class TextEvaluation(Evaluation):
    """An evaluation of windows."""

    def report_full_first(self) -> None:
        self.tally.methods = [FULL, *(method for method in self.tally.methods if method != FULL)]

    def windows(
        self, suite: str, begin: Begin, cut: Callable[[int], tuple[int, int]]
    ) -> Iterator[tuple[str, int, Sequence[Window]]]:
        """The windows of all texts by name and lengths; notes say what is left out.

        Args:
            cut: of a length the tokens of windows, and how many of the last ones are looked at.

        Raises:
            EvaluationError: a length that is too small; as of `open_texts`.
            DataError: a text that cannot be read.
        """
        settings = self.settings
        lengths = settings.lengths or (min(LENGTH, self.max_length),)
        if min(lengths) < SHORTEST:
            raise EvaluationError(f"a length of {suite} must be at least {SHORTEST} tokens, got {min(lengths)}")
        texts = self.open_texts()
        advance = begin("reading texts", len(texts) * len(lengths))
        for text in texts:
            for length in lengths:
                place = {"suite": suite, "task": text.name, "length": length}
                advance(1)
                if length > self.max_length:
                    self.notes.append(place | {"why": f"skipped: the model's contexts end at {self.max_length} tokens"})
                    continue
                tokens, compared = cut(length)
                try:
                    windows = text.windows(tokens, settings.limit, compared)
                except ShortTextError as error:
                    self.notes.append(place | {"why": f"skipped: {error}"})
                    continue
                self.notes += [place | {"why": why} for why in reservations(windows, settings.limit)]
                yield text.name, length, windows

    def refuse_other_windows(self, suite: str, text: str, length: int, asked: Mapping[str, str]) -> None:
        """Raises EvaluationError when samples of other windows of a text would be averaged with those of this run.

        Args:
            asked: fingerprints of the windows by their keys.
        """
        known = {one.key for one in self.samples.samples.values() if (one.suite, one.task, one.length) == (suite, text, length)}
        if not (known <= asked.keys() or asked.keys() <= known):
            raise EvaluationError(
                f"{self.settings.out} has other windows of {text} at {length} tokens: give the same --limit, --compare and "
                "--new-tokens, or choose another directory"
            )
        self.samples.check(suite, text, length, asked)
