"""Values of short formulas in LaTeX or plain text: the arithmetic that answers to mathematics problems are written in.

Numbers, one-letter variables, pi, e, i, fractions, roots, powers, products without a sign and mixed numbers are read; nothing
else is. Rational numbers stay exact. Variables are given fixed positive values: two formulas are equal if their values are.
"""

from __future__ import annotations

import cmath
import math
import re
from fractions import Fraction

Value = Fraction | complex

POINTS = 3  # sets of values of the variables
_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+|[a-zA-Z]|[-+*/^(){}\[\]])")
_PRODUCT_SIGNS = ("*", r"\cdot", r"\times", "/", r"\div")
_LONGEST, _DEEPEST, _LARGEST_POWER, _MOST_BITS = 400, 40, 4096, 20_000


class Unreadable(ValueError):
    """Not a formula of the kind that is read here."""


def same_value(first: str, second: str) -> bool | None:
    """Whether two formulas have equal values wherever their variables are; None where one of them is not read."""
    try:
        return all(_close(value(first, point), value(second, point)) for point in range(POINTS))
    except Unreadable:
        return None


def value(text: str, point: int = 0) -> Value:
    """The value of a formula; `point` chooses the values of its variables.

    Raises:
        Unreadable: it is no formula, is too long, or has no value.
    """
    if len(text) > _LONGEST:
        raise Unreadable("too long")
    try:
        return _Reader(text, point).whole()
    except (ArithmeticError, ValueError) as error:  # division by zero, overflow
        raise Unreadable(str(error)) from error


def _close(first: Value, second: Value) -> bool:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    a, b = _as_complex(first), _as_complex(second)
    return abs(a - b) <= max(1e-12, 1e-9 * max(abs(a), abs(b)))


def _as_complex(number: Value) -> complex:
    return complex(float(number)) if isinstance(number, Fraction) else number


class _Reader:
    """Reads a formula from left to right and computes while it reads."""

    def __init__(self, text: str, point: int) -> None:
        self.tokens: list[str] = []
        place, end = 0, len(text.rstrip())
        while place < end:
            match = _TOKEN.match(text, place)
            if not match:
                raise Unreadable(text[place:])
            self.tokens.append(match[1])
            place = match.end()
        self.point, self.place, self.depth = point, 0, 0

    def whole(self) -> Value:
        result = self._sum()
        if self.place < len(self.tokens):
            raise Unreadable(self.tokens[self.place])
        return result

    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self, token: str = "") -> str:
        found = self._next()
        if not found or (token and found != token):
            raise Unreadable(found or "the end")
        self.place += 1
        return found

    def _sum(self) -> Value:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Unreadable("too deep")
        result = self._product()
        while self._next() in ("+", "-"):
            sign = self._take()
            term = self._product()
            result = _add(result, term if sign == "+" else _multiply(Fraction(-1), term))
        self.depth -= 1
        return result

    def _product(self) -> Value:
        result = self._signed()
        while (token := self._next()) and token not in ("+", "-", ")", "}", "]"):
            if token in _PRODUCT_SIGNS:
                sign, factor = self._take(), self._signed()
                result = _divide(result, factor) if sign in ("/", r"\div") else _multiply(result, factor)
            elif token[0].isdigit() or token[0] == ".":
                raise Unreadable("a number behind a factor")
            else:
                result = _multiply(result, self._power())
        return result

    def _signed(self) -> Value:
        if self._next() in ("+", "-"):
            sign = self._take()
            number = self._signed()
            return number if sign == "+" else _multiply(Fraction(-1), number)
        return self._power()

    def _power(self) -> Value:
        base = self._atom()
        if self._next() != "^":
            return base
        self._take()
        return _raise(base, self._group() if self._next() == "{" else self._signed_atom())

    def _signed_atom(self) -> Value:
        if self._next() != "-":
            return self._atom()
        self._take()
        return _multiply(Fraction(-1), self._atom())

    def _atom(self) -> Value:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            number = Fraction(token.rstrip("."))
            return _add(number, self._fraction()) if self._mixed(token) else number
        if token == r"\frac":
            self.place -= 1
            return self._fraction()
        if token == r"\sqrt":
            degree: Value = Fraction(2)
            if self._next() == "[":
                self._take()
                degree = self._sum()
                self._take("]")
            return _root(self._argument(), degree)
        if token in ("(", "{"):
            inner = self._sum()
            self._take(")" if token == "(" else "}")
            return inner
        if token == r"\pi":
            return complex(math.pi)
        if len(token) == 1 and token.isalpha():
            return self._letter(token)
        raise Unreadable(token)

    def _letter(self, letter: str) -> Value:
        if letter == "i":
            return 1j
        if letter == "e":
            return complex(math.e)
        return complex(0.5 + math.sin(12.9898 * ord(letter) + 78.233 * self.point) * 43758.5453 % 2)

    def _group(self) -> Value:
        self._take("{")
        inner = self._sum()
        self._take("}")
        return inner

    def _argument(self) -> Value:
        r"""The argument of \frac or \sqrt: a group, or a single digit or sign (\frac12 is a half)."""
        token = self._next()
        if token == "{":
            return self._group()
        if token[:1].isdigit() and len(token) > 1 and token.isdigit():
            self.tokens[self.place : self.place + 1] = [token[0], token[1:]]
        return self._atom()

    def _fraction(self) -> Value:
        self._take(r"\frac")
        above = self._argument()
        return _divide(above, self._argument())

    def _mixed(self, whole: str) -> bool:
        """Whether a fraction of whole numbers below one follows a whole number."""
        rest = "".join(self.tokens[self.place : self.place + 7])
        match = re.match(r"\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", rest)
        if not match or not whole.isdigit():
            return False
        above, below = (int(number) for number in match.groups() if number is not None)
        return 0 < above < below


def _add(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first + second
    return _as_complex(first) + _as_complex(second)


def _multiply(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first * second
    return _as_complex(first) * _as_complex(second)


def _divide(first: Value, second: Value) -> Value:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first / second
    return _as_complex(first) / _as_complex(second)


def _raise(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if exponent.denominator != 1:
            return _root(_raise(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) > _LARGEST_POWER or bits * abs(exponent) > _MOST_BITS:
            raise Unreadable("too large a power")
        return Fraction(base ** int(exponent))
    return _as_complex(base) ** _as_complex(exponent)


def _root(number: Value, degree: Value) -> Value:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 2 <= degree <= 64:
        raise Unreadable("a root of an unusual degree")
    if isinstance(number, Fraction) and (number >= 0 or degree % 2):
        sign = 1 if number >= 0 else -1
        above, below = (_whole_root(abs(part), int(degree)) for part in (number.numerator, number.denominator))
        if above is not None and below is not None:
            return Fraction(sign * above, below)
        return complex(sign * abs(float(number)) ** (1 / int(degree)))
    if degree == 2:
        return cmath.sqrt(_as_complex(number))
    return _as_complex(number) ** (1 / int(degree))


def _whole_root(number: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(number)
    else:
        root = round(float(number) ** (1 / degree))
    return root if root**degree == number else None
