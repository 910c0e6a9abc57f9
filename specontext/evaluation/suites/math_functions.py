"""Functions in answers to mathematics problems, of complex numbers."""

from __future__ import annotations

import cmath
from collections.abc import Callable

Function = Callable[[complex], complex]


def logarithm(number: complex, base: complex) -> complex:
    return cmath.log(number) / cmath.log(base)


def _log10(number: complex) -> complex:
    return logarithm(number, 10)


def _cot(number: complex) -> complex:
    return 1 / cmath.tan(number)


def _sec(number: complex) -> complex:
    return 1 / cmath.cos(number)


def _csc(number: complex) -> complex:
    return 1 / cmath.sin(number)


FUNCTIONS: dict[str, Function] = {
    r"\sin": cmath.sin,
    r"\cos": cmath.cos,
    r"\tan": cmath.tan,
    r"\cot": _cot,
    r"\sec": _sec,
    r"\csc": _csc,
    r"\arcsin": cmath.asin,
    r"\arccos": cmath.acos,
    r"\arctan": cmath.atan,
    r"\sinh": cmath.sinh,
    r"\cosh": cmath.cosh,
    r"\tanh": cmath.tanh,
    r"\exp": cmath.exp,
    r"\ln": cmath.log,
    r"\log": _log10,
}
# What \sin^{-1} and its like are.
INVERSES: dict[str, Function] = {r"\sin": cmath.asin, r"\cos": cmath.acos, r"\tan": cmath.atan}
