"""The rows of an evaluation, counted from its samples as they come, and written as often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specontext.evaluation.cells import Note
from specontext.evaluation.results import write_results
from specontext.evaluation.rows import Cell, Row, by_cell, cell_rows
from specontext.evaluation.samples import EvaluationError, Sample, SampleFile
from specontext.evaluation.settings import EvaluationSettings


class Tally:
    """Rows and pairs of all cells that have samples, and `results.json`, which has them.

    Args:
        meta: what the run says of itself.
        notes: those of the run, which adds to them.
        earlier: those of the runs that it goes on with.

    Attributes:
        methods: in the order in which they are reported.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        samples: SampleFile,
        methods: Sequence[str],
        meta: dict[str, Any],
        notes: list[Note],
        earlier: Sequence[Note],
    ) -> None:
        self.methods = list(methods)
        self._folder, self._seed, self._samples = settings.out, settings.seed, samples
        self._meta, self._notes, self._earlier = meta, notes, earlier
        self._rows: dict[Cell, tuple[list[Row], list[Row]]] = {}

    def recount(self, cell: Cell) -> None:
        """Write `results.json` again after a cell has got samples."""
        self._count(cell, by_cell(self._samples.samples.values())[cell])
        self.write()

    def count_all(self) -> None:
        """Write what is known before the run."""
        for cell, samples in by_cell(self._samples.samples.values()).items():
            self._count(cell, samples)
        self.write()

    def _count(self, cell: Cell, samples: Sequence[Sample]) -> None:
        try:
            self._rows[cell] = cell_rows(samples, methods=self.methods, seed=self._seed)
        except KeyError as error:
            what = f"samples of {'/'.join(map(str, cell))} that have no score {error}"
            raise EvaluationError(f"{self._folder} has {what}: mend them or choose another directory") from error

    def write(self) -> dict[str, Any]:
        """Write `results.json` as far as it is known; its content."""
        rows = [row for some, _ in self._rows.values() for row in some]
        pairs = [pair for _, some in self._rows.values() for pair in some]
        known = [note for note in self._earlier if note not in self._notes]
        meta = self._meta | {"notes": [*known, *self._notes]}
        write_results(self._folder, meta, rows, pairs)
        return {"meta": meta, "rows": rows, "pairs": pairs}
