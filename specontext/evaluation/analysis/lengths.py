"""Attention recall against context length, at budgets in proportion, with YaRN on and off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from specontext.distill.data import DataError, Source
from specontext.distill.target import Target
from specontext.evaluation.analysis.recall import judge
from specontext.evaluation.analysis.rows import LENGTH_CURVE, Row
from specontext.evaluation.analysis.selection import Entrant
from specontext.evaluation.analysis.settings import Settings
from specontext.evaluation.analysis.texts import draw_samples
from specontext.retrieval.head_config import HeadConfig

SHARES = (8, 16)  # budgets are 1/8 and 1/16 of the length
COMPARED = ("oracle", "shared_oracle", "streaming")
FEWEST = 4  # sequences of a length


@dataclass
class LengthCurve:
    """Rows `recall_vs_length`, and for each length what they were measured with.

    Attributes:
        left_out: why lengths that were not asked for by name are missing.
    """

    rows: list[Row] = field(default_factory=list)
    measured: dict[int, dict[str, object]] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)


def standard_lengths(config: HeadConfig, longest: int, always: int) -> tuple[int, ...]:
    """One and two times the trained length, and powers of two from 512 on that are not close to these, up to `longest`."""
    trained = {config.trained_length, 2 * config.trained_length}
    powers = {2**power for power in range(9, longest.bit_length())}
    lengths = trained | {power for power in powers if all(abs(power - length) > 0.2 * length for length in trained)}
    return tuple(sorted(length for length in lengths if length <= longest and length // SHARES[0] > always))


def yarn_states(config: HeadConfig, length: int, longest: int) -> dict[str, float]:
    """YaRN factors by the name of the state.

    `no_yarn` is factor 1, `yarn` the factor for the longest context of the curve, `default` what the engine sets when this length
    is its longest context. A head with RoPE scaling of its own has the last only; `yarn` is left out where its factor is 1.
    """
    default = config.yarn_factor(length)
    if config.rope_scaling is not None:
        return {"default": default}
    factor = longest / config.trained_length
    return {"no_yarn": 1.0} | ({"yarn": factor} if factor > 1 else {}) | {"default": default}


def sequences_at(length: int, settings: Settings, main_length: int) -> int:
    """About as many tokens at every length beyond the main one, but no fewer than `FEWEST` sequences if so many are asked for."""
    return min(settings.sequences, max(FEWEST, settings.sequences * main_length // length))


def length_curve(
    target: Target,
    entrant: Entrant,
    source: Source,
    lengths: Sequence[int],
    settings: Settings,
    *,
    main_length: int,
    tick: Callable[[], None] = lambda: None,
) -> LengthCurve:
    """Measure one head, at head level with its standard map.

    Args:
        tick: called after each length.

    Raises:
        DataError: texts that cannot fill a length of `settings.lengths`.
    """
    curve = LengthCurve()
    config = entrant.head.config
    for length in lengths:
        asked = sequences_at(length, settings, main_length)
        try:
            samples = draw_samples(source, length, asked)
        except DataError as error:
            if settings.lengths is not None:
                raise
            curve.left_out[length] = str(error)
            tick()
            continue
        states = yarn_states(config, length, max(lengths))
        by_factor: dict[float, list[str]] = {}
        for name, factor in states.items():
            by_factor.setdefault(factor, []).append(name)
        standard = entrant.standard()
        entrants = [replace(standard, label=names[0], yarn_factor=factor) for factor, names in by_factor.items()]
        budgets = [length // share for share in SHARES if length // share > settings.always]
        judged = judge(target, entrants, samples, budgets, settings)
        rows = judged.rows(length, LENGTH_CURVE)
        for names in by_factor.values():
            for one in (one for one in rows if one["variant"] == names[0]):
                curve.rows += [one | {"what": f"{LENGTH_CURVE}:{name}", "variant": entrant.label} for name in names]
        curve.rows += [one for one in rows if one["method"] in COMPARED and one["granularity"] in ("head", None)]
        curve.measured[length] = {
            "asked_sequences": asked,
            "sequences": len(samples),
            "queries": judged.queries,
            "mean_tokens": sum(sample.tokens for sample in samples) / len(samples),
            "yarn_factors": states,
        }
        tick()
    return curve
