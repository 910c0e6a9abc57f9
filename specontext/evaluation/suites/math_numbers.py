"""Arithmetic of the values of answers to mathematics problems: rational numbers stay exact, others are complex."""

from __future__ import annotations

import cmath
import math
from fractions import Fraction

Value = Fraction | complex

_LARGEST_POWER, _MOST_BITS, _LARGEST_FACTORIAL = 4096, 20_000, 200


class Unreadable(ValueError):
    """Not a formula of the kind that is read here, or one without a value."""


def as_complex(number: Value) -> complex:
    """Raises Unreadable for a number beyond all floating-point ones."""
    try:
        return complex(float(number)) if isinstance(number, Fraction) else number
    except OverflowError as error:
        raise Unreadable("too large a number") from error


def add(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first + second
    return as_complex(first) + as_complex(second)


def multiply(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first * second
    return as_complex(first) * as_complex(second)


def divide(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first / second
    return as_complex(first) / as_complex(second)


def power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if exponent.denominator != 1:
            return root(power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) > _LARGEST_POWER or bits * abs(exponent) > _MOST_BITS:
            raise Unreadable("too large a power")
        return Fraction(base ** int(exponent))
    return as_complex(base) ** as_complex(exponent)


def factorial(number: Value) -> Value:
    if not isinstance(number, Fraction) or number.denominator != 1 or not 0 <= number <= _LARGEST_FACTORIAL:
        raise Unreadable("a factorial of an unusual number")
    return Fraction(math.factorial(int(number)))


def binomial(above: Value, below: Value) -> Value:
    for number in (above, below):
        if not isinstance(number, Fraction) or number.denominator != 1 or not 0 <= number <= _LARGEST_FACTORIAL:
            raise Unreadable("a binomial of unusual numbers")
    assert isinstance(above, Fraction) and isinstance(below, Fraction)
    return Fraction(math.comb(int(above), int(below)))


def root(number: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 64:
        raise Unreadable("a root of an unusual degree")
    if isinstance(number, Fraction) and (number >= 0 or degree % 2):
        sign = 1 if number >= 0 else -1
        above, below = (_whole_root(abs(part), int(degree)) for part in (number.numerator, number.denominator))
        if above is not None and below is not None:
            return Fraction(sign * above, below)
        return complex(sign * abs(float(number)) ** (1 / int(degree)))
    if degree == 2:
        return cmath.sqrt(as_complex(number))
    return as_complex(number) ** (1 / int(degree))


def _whole_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    else:
        root = round(float(number) ** (1 / degree))
    return root if root**degree == number else None
