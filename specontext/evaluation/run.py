"""Run an evaluation: every method answers the same problems greedily through the same engine.

Problems go in batches of as many as the engine has seats. A batch is prefilled once; then each method and budget answers it,
all its requests together, and finds the prompts in the prefix cache. Whatever was answered is on the disk at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specontext.engine.llm import LLM
from specontext.engine.start import pick_device
from specontext.evaluation.answering import answer, batches, sample_id
from specontext.evaluation.budgets import entries
from specontext.evaluation.cells import EvalCell, Note, choose_tasks, draw_cells
from specontext.evaluation.competitors import Choice, Competitor, parse_competitors
from specontext.evaluation.engines import Engines, Group
from specontext.evaluation.known_heads import KnownHeads
from specontext.evaluation.results import environment, read_meta
from specontext.evaluation.samples import FILE, EvaluationError, Sample, SampleFile, SampleId, fingerprint
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.tally import Tally
from specontext.evaluation.text_tools import text_tools
from specontext.evaluation.windows import Text
from specontext.models.loading import LoadedModel, load_model
from specontext.sampling_params import SamplingParams

Advance = Callable[[int], None]
Begin = Callable[[str, int], Advance]  # a phase and its number of parts; the result is called with parts that are done


def run_evaluation(
    settings: EvaluationSettings, begin: Begin, kind: type[Evaluation] | None = None, loaded: LoadedModel | None = None
) -> dict[str, Any]:
    """Run what is not there yet, and return the content of `results.json`.

    Args:
        kind: what is done with each problem; None lets every method answer it.
        loaded: the model, where it is loaded already.

    Raises:
        EvaluationError: a directory of another evaluation, a method that cannot work on the model, or nothing to run.
        SpeContextError: a model, head or data that cannot be read.
    """
    before = open_folder(settings)
    loaded = loaded or _load(settings)
    competitors = parse_competitors(settings.methods)
    notes: list[Note] = []
    kind = kind or Evaluation
    engines = Engines(loaded, settings)
    try:
        competitors = _supported(engines, competitors, settings, notes)
        return kind(settings, loaded, engines, competitors, notes, before).run(begin)
    finally:
        engines.close()


def open_folder(settings: EvaluationSettings) -> dict[str, Any] | None:
    """Make the directory; the meta of the run that is continued.

    Raises:
        EvaluationError: it cannot be made, or has samples that do not belong to this evaluation.
    """
    folder = settings.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"the directory {folder} cannot be made: {error.strerror or error}") from error
    before = read_meta(folder)
    if before is None:
        if (folder / FILE).exists():
            raise EvaluationError(f"{folder} has samples and no results.json that says of what: choose another directory")
        return None
    known, asked = before.get("settings", {}), settings.identity
    if other := [name for name in {**known, **asked} if known.get(name) != asked.get(name)]:
        said = ", ".join(f"{name} {known.get(name)} instead of {asked.get(name)}" for name in other)
        raise EvaluationError(f"{folder} has results of another evaluation ({said}): choose another directory")
    return before


def _load(settings: EvaluationSettings) -> LoadedModel:
    options = settings.engine
    return load_model(
        settings.model,
        dtype=options.get("dtype", "auto"),
        device=pick_device(options.get("device", "auto")),
        load_format=options.get("load_format", "auto"),
        quantization=options.get("quantization"),
        trust_remote_code=options.get("trust_remote_code", False),
        revision=options.get("revision"),
    )


def _supported(
    engines: Engines, competitors: Sequence[Competitor], settings: EvaluationSettings, notes: list[Note]
) -> tuple[Competitor, ...]:
    """The methods that can work on the model; raises EvaluationError for the others unless they are to be skipped."""
    reasons = engines.unsupported(competitors)
    if reasons and not settings.skip_unsupported:
        said = "; ".join(f"{competitor.label}: {why}" for competitor, why in reasons.items())
        raise EvaluationError(f"{said} (--skip-unsupported runs the other methods)")
    notes += [{"method": competitor.label, "why": f"skipped: {why}"} for competitor, why in reasons.items()]
    left = tuple(competitor for competitor in competitors if competitor not in reasons)
    if not left:
        raise EvaluationError("no method is left: " + "; ".join(dict.fromkeys(reasons.values())))
    return left


class Evaluation:
    """One run: its problems, methods and what is known so far."""

    def __init__(
        self,
        settings: EvaluationSettings,
        loaded: LoadedModel,
        engines: Engines,
        competitors: Sequence[Competitor],
        notes: list[Note],
        before: dict[str, Any] | None,
    ) -> None:
        self.settings, self.engines, self.competitors, self.notes = settings, engines, competitors, notes
        self.groups = engines.groups(competitors)
        self.heads = KnownHeads(settings.out, before)
        llm = self.open(self.groups[0])
        assert engines.budget is not None
        self.budgets = settings.budgets or (engines.budget,)
        self.max_length = llm.engine.parts.max_tokens
        self.text, self.tokenizer = text_tools(loaded.tokenizer), loaded.tokenizer
        self.vocab_size = loaded.shape.vocab_size
        self.samples = SampleFile(settings.out)
        meta = self._meta(llm, before)
        for name in ("dtype", "weights"):
            if before is not None and before.get(name, meta[name]) != meta[name]:
                said = f"{name} {before[name]} instead of {meta[name]}, as they are on this machine"
                raise EvaluationError(f"{settings.out} has results of another evaluation ({said}): choose another directory")
        asked = [competitor.label for competitor in competitors]
        methods = list(dict.fromkeys([*asked, *(sample.method for sample in self.samples.samples.values())]))
        self.tally = Tally(settings, self.samples, methods, meta, notes, (before or {}).get("notes", []))

    def open(self, group: Group) -> LLM:
        """The engine of a group.

        Raises:
            EvaluationError: its retrieval head is not the one that samples were made with.
            SpeContextError: as of `Engines.open`.
        """
        llm = self.engines.open(group)
        self.heads.check(group.head or self.settings.retrieval_head, llm.engine.parts.head)
        return llm

    def _meta(self, llm: LLM, before: dict[str, Any] | None) -> dict[str, Any]:
        settings, earlier = self.settings, before or {}
        head = llm.engine.parts.head
        commands = [*str(earlier.get("command") or "").split(" && "), settings.command or ""]
        return {
            "model": settings.model,
            "weights": llm.engine.loaded.weights_note,
            "dtype": str(llm.shape.dtype).removeprefix("torch."),
            "head": None if head is None else settings.retrieval_head,
            "heads": self.heads.prints,
            "command": " && ".join(dict.fromkeys(command for command in commands if command)) or None,
            **environment(llm.engine.device),
            "seed": settings.seed,
            "suite": list(dict.fromkeys([*earlier.get("suite", []), *settings.suites])),
            "settings": settings.identity,
            "longest_context": self.max_length,
            "seats": llm.engine.config.max_num_seqs,
        }

    def run(self, begin: Begin) -> dict[str, Any]:
        """All cells through all engines."""
        tasks = choose_tasks(self.settings, self.text, self.max_length, self.notes, self.open_texts())
        advance = begin("drawing problems", len(tasks))
        cells: list[EvalCell] = []
        for task in tasks:
            cells += draw_cells([task], self.settings, self.text, self.tokenizer, self.max_length, self.notes)
            advance(1)
        self.refuse_nothing(cells)
        for cell in cells:
            asked = {problem.example.key: fingerprint(problem.token_ids) for problem in cell.problems}
            self.samples.check(cell.task.suite, cell.task.name, cell.length, asked)
        wanted = [(group, cell, self.choices(group, cell.task.suite, cell.length)) for group in self.groups for cell in cells]
        self.tally.count_all()
        known = self.answered
        missing = any(
            sample_id(cell, p, choice) not in known for _, cell, choices in wanted for p in cell.problems for choice in choices
        )
        if missing and self.settings.judge is not None:
            self.settings.judge.try_out()
        advance = begin("answering", sum(len(cell.problems) * len(choices) for _, cell, choices in wanted))
        for group, cell, choices in wanted:
            self._run_cell(self.open(group), cell, choices, advance)
        return self.tally.write()

    def refuse_nothing(self, found: Sequence[object]) -> None:
        """Raises EvaluationError where nothing was found that can be run."""
        if not found:
            raise EvaluationError("nothing can be run: " + "; ".join(dict.fromkeys(note["why"] for note in self.notes)))

    @property
    def answered(self) -> dict[SampleId, Sample]:
        """The samples that need not be made again: where recall is to be measured, those that have it."""
        samples = self.samples.samples
        if not self.settings.engine.get("measure_recall"):
            return samples
        return {name: one for name, one in samples.items() if one.stats.get("attention_recall") is not None}

    def open_texts(self) -> list[Text]:
        """The texts that were given.

        Raises:
            EvaluationError: two of the same name.
            DataError: one that cannot be read.
        """
        options = {"seed": self.settings.seed, "vocab_size": self.vocab_size}
        texts = [Text(spec, self.tokenizer, **options) for spec in dict.fromkeys(self.settings.texts)]
        if len({text.name for text in texts}) < len(texts):
            raise EvaluationError("two texts have the same name: give them as relative paths, or rename one")
        return texts

    def choices(self, group: Group, suite: str, length: int | None) -> list[Choice]:
        """Methods and budgets of a cell, without budgets that hold everything; the run says which."""
        budgets = self._budgets(suite, length) if any(one.budgets((1,)) != (None,) for one in group.competitors) else []
        return [(competitor, budget) for competitor in group.competitors for budget in competitor.budgets(budgets)]

    def _budgets(self, suite: str, length: int | None) -> list[int]:
        """The KV entries of the budgets at a length, without those that hold everything or nothing; the run says which."""
        fitting, least = [], self.settings.least_budget
        for asked in self.budgets:
            budget, why = entries(asked, length), None
            if length is not None and budget >= length:
                why = f"skipped: a budget of {budget} holds all of {length} tokens, which is what full reads"
            elif budget < least:  # of a share
                why = f"skipped: {asked} of {length} tokens is less than the {least} of sinks, recent window and one more"
            if why is None:
                fitting.append(budget)
                continue
            note = {"suite": suite, "length": length, "budget": budget, "why": why}
            self.notes += [note] if note not in self.notes else []
        return fitting

    def _run_cell(self, llm: LLM, cell: EvalCell, choices: Sequence[Choice], advance: Advance) -> None:
        known, added = self.answered, False
        for batch in batches(cell.problems, llm.engine.config.max_num_seqs):
            todo = [(choice, [p for p in batch if sample_id(cell, p, choice) not in known]) for choice in choices]
            advance(sum(len(batch) - len(problems) for _, problems in todo))
            todo = [(choice, problems) for choice, problems in todo if problems]
            if todo and llm.engine.config.enable_prefix_caching:  # so that no method's time has the prompts in it
                llm.generate([p.token_ids for p in batch], SamplingParams(temperature=0.0, max_tokens=1))
            for choice, problems in todo:
                self.samples.add(answer(llm, cell, problems, choice, self.settings.seed))
                advance(len(problems))
                added = True
        if added:
            self.tally.recount((cell.task.suite, cell.task.name, cell.length))
