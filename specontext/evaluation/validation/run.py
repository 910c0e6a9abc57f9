"""All parts of a validation, one after another; what is known is on the disk after each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specontext.engine.start import pick_device
from specontext.errors import SpeContextError
from specontext.evaluation.fidelity.run import run_fidelity
from specontext.evaluation.report import write_report
from specontext.evaluation.results import environment
from specontext.evaluation.run import Begin, open_folder, run_evaluation
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.suites import SUITES, TextTools
from specontext.evaluation.text_tools import prompt_ids, text_tools
from specontext.evaluation.validation.machine import machine
from specontext.evaluation.validation.summary import summary
from specontext.evaluation.validation.systems import SYSTEMS, Question, Trial, free_memory, run_system
from specontext.evaluation.windows import ShortTextError, Text
from specontext.models.loading import LoadedModel, load_model
from specontext.retrieval.catalog import find_head

RULER = ("niah_single_2", "niah_multikey_2", "niah_multivalue", "vt", "fwe")
RULER_OF_NANO = ("niah_single", "niah_multikey", "variable_tracking")
SPARE = 64  # tokens of context beyond the longest prompt and its output


@dataclass(frozen=True)
class ValidationSettings:
    """What to validate, and how thoroughly.

    Attributes:
        out: directory of everything that is written; a stopped validation goes on there.
        methods: of fidelity and RULER; full attention and the retrieval head's own should be among them.
        budgets: KV entries that are read; None is what the retrieval head recommends. The first one is that of chain and speed.
        lengths: contexts in tokens; those beyond the model are left out.
        texts: of fidelity and of the prompts that decoding is timed at.
        windows, problems: of each text, or of each task of RULER, at each length.
        compared: last tokens of a window at which fidelity compares.
        chain_length: tokens of the chain of thought's prompt and expected output together.
        chain_tokens: that may be written at least, for models that think before they answer.
        steps: tokens that are timed at each context.
        command: recorded in the results.

    Raises:
        EvaluationError: values that make no sense.
    """

    model: str
    out: Path
    retrieval_head: str = "auto"
    methods: tuple[str, ...] = ("full", "speculative", "streaming")
    budgets: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = (4096, 16384, 32768)
    texts: tuple[str, ...] = ("tasks",)
    windows: int = 8
    problems: int = 10
    compared: int = 128
    chain_length: int = 8192
    chain_tokens: int = 4096
    steps: int = 128
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    command: str | None = None

    def __post_init__(self) -> None:
        if not self.lengths:
            raise EvaluationError("no length was named: give at least one")
        for name in ("windows", "problems", "compared", "chain_length", "chain_tokens", "steps"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if wrong := [length for length in self.lengths if length < 2 * self.steps]:
            raise EvaluationError(
                f"a length of {wrong[0]} leaves no prompt before {self.steps} timed tokens: raise it, or lower steps"
            )


def validate(settings: ValidationSettings, begin: Begin) -> Path:
    """Run all parts and write `summary.md`, `validation.json` and the report of the evaluations.

    A part that cannot be run is named in the summary, and the others are run.

    Returns:
        The summary.

    Raises:
        EvaluationError: lengths beyond the model, unknown methods, or a directory that cannot be used.
        SpeContextError: a model, its retrieval head or a text that cannot be loaded.
    """
    return _Validation(settings, begin).run()


class _Validation:
    def __init__(self, settings: ValidationSettings, begin: Begin) -> None:
        self.settings, self.begin = settings, begin
        self.loaded = load_model(settings.model, dtype=settings.dtype, device=pick_device(settings.device))
        shape, most = self.loaded.shape, self.loaded.shape.max_position
        # Without its head there is nothing to validate; better said before hours of full attention.
        find_head(settings.retrieval_head, model_name=self.loaded.head_name, model_path=self.loaded.path, target=shape)
        self.lengths = tuple(length for length in settings.lengths if length <= most)
        if not self.lengths:
            raise EvaluationError(f"the model's contexts end at {most} tokens: give shorter --lengths")
        self.text = text_tools(self.loaded.tokenizer)
        specs = dict.fromkeys((*settings.texts, "tasks"))
        self.texts = [Text(spec, self.loaded.tokenizer, seed=settings.seed) for spec in specs]
        self.question = _question(settings, self.loaded, self.text)
        ids = prompt_ids(self.loaded.tokenizer, self.question.example.prompt)
        self.longest = min(most, max(*self.lengths, len(ids) + self.question.max_tokens) + SPARE)
        self.content: dict[str, Any] = {
            "settings": {name: value for name, value in asdict(settings).items() if name != "out"},
            **environment(self.loaded.model.device),
            "host": machine(self.loaded.model.device),
            "model": {
                "name": settings.model,
                "longest": most,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "weights": self.loaded.weights_note,
            },
            "longest_context": self.longest,
            "lengths": self.lengths,
            "too_long": [length for length in settings.lengths if length > most],
            "systems": [],
            "failures": {},
        }
        open_folder(self._evaluation("ruler", settings.problems))

    def run(self) -> Path:
        self._part("fidelity", self._fidelity)
        self._part("ruler", self._ruler)
        for name in SYSTEMS:
            self._part(name, lambda name=name: self._system(name))  # type: ignore[misc]
        return self.settings.out / "summary.md"

    def _part(self, name: str, run: Callable[[], None]) -> None:
        try:
            run()
        except SpeContextError as error:
            self.content["failures"][name] = str(error)
        free_memory(self.loaded.model.device)
        self._write()

    def _write(self) -> None:
        folder = self.settings.out
        results = folder / "results.json"
        evaluated: dict[str, Any] = {"rows": [], "pairs": []}
        if results.exists():
            write_report(folder)
            evaluated = json.loads(results.read_text(encoding="utf-8"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self.content, indent=1, ensure_ascii=False)
            (folder / "validation.json").write_text(content + "\n", encoding="utf-8")
            (folder / "summary.md").write_text(summary(self.content, evaluated), encoding="utf-8")
        except OSError as error:
            raise EvaluationError(f"the summary cannot be written to {folder}: {error.strerror or error}") from error

    def _evaluation(self, suite: str, limit: int, **options: Any) -> EvaluationSettings:
        settings = self.settings
        return EvaluationSettings(
            settings.model,
            (suite,),
            settings.out,
            methods=settings.methods,
            budgets=settings.budgets,
            lengths=self.lengths,
            limit=limit,
            seed=settings.seed,
            retrieval_head=settings.retrieval_head,
            engine={"max_model_len": self.longest, "device": settings.device, "dtype": settings.dtype},
            skip_unsupported=True,
            command=settings.command,
            **options,
        )

    def _fidelity(self) -> None:
        settings = self.settings
        asked = self._evaluation("fidelity", settings.windows, texts=settings.texts, compared=settings.compared)
        run_fidelity(replace(asked, engine=asked.engine | {"measure_recall": True}), self.begin, self.loaded)

    def _ruler(self) -> None:
        fit = [task.name for task in SUITES["ruler"]() if getattr(task, "unfit")(self.text) is None]  # noqa: B009
        tasks = tuple(name for name in (*RULER, *RULER_OF_NANO) if name in fit)
        run_evaluation(self._evaluation("ruler", self.settings.problems, tasks=tasks), self.begin, loaded=self.loaded)

    def _system(self, name: str) -> None:
        settings = self.settings
        budget = settings.budgets[0] if settings.budgets else None
        trial = Trial(self.question, [self._prompt(length) for length in self.lengths], budget, settings.steps, self.longest)
        result = run_system(name, self.loaded, settings.retrieval_head, trial, self.begin(name, trial.tokens))
        self.content["systems"].append(result.as_dict())

    def _prompt(self, length: int) -> list[int]:
        """A text that leaves room for the tokens that are timed, of the first source that is long enough."""
        room = length - self.settings.steps - 1
        for text in self.texts:
            try:
                return text.windows(room, 1, 1)[0].token_ids
            except ShortTextError as error:
                why = error
        raise why


def _question(settings: ValidationSettings, loaded: LoadedModel, text: TextTools) -> Question:
    """A program to be worked line by line, as the suite `reasoning` asks it."""
    most = loaded.shape.max_position
    length = min(settings.chain_length, most)
    task = next(task for task in SUITES["reasoning"]() if getattr(task, "unfit")(text) is None)  # noqa: B009
    (example,) = task.examples(length=length, n=1, seed=settings.seed, text=text)
    room = most - len(prompt_ids(loaded.tokenizer, example.prompt))
    return Question(task, example, min(max(example.max_tokens, settings.chain_tokens), room))
