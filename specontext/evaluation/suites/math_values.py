"""Values of short formulas in LaTeX or plain text: the arithmetic that answers to mathematics problems are written in.

Numbers, variables (a letter or a Greek one, with its subscript), pi, e, i, fractions, roots, powers, products without a sign,
mixed numbers, factorials, binomials, absolute and rounded values and the functions of `math_functions` are read; nothing else
is. Rational numbers stay exact. Variables are given fixed values, positive ones unless that would hide differences: two formulas
are equal if their values are.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction

from specontext.evaluation.suites.math_functions import FUNCTIONS, INVERSES, logarithm
from specontext.evaluation.suites.math_numbers import (
    Unreadable,
    Value,
    add,
    as_complex,
    binomial,
    divide,
    factorial,
    multiply,
    power,
    root,
)

POINTS = 3  # sets of values of the variables; as many each have negative and large ones
_SUBSCRIPT = r"(?:\s*_\{[^{}]*\})?"
_TOKEN = re.compile(rf"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+{_SUBSCRIPT}|[a-zA-Z](?:\(\d+\)|{_SUBSCRIPT})|[-+*/^(){{}}\[\]|!])")
_GREEK = frozenset(
    rf"\{name}"
    for name in "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split()
)
_ROUNDED = {r"\lfloor": (r"\rfloor", math.floor), r"\lceil": (r"\rceil", math.ceil)}
_ENDS = ("+", "-", ")", "}", "]", r"\rfloor", r"\rceil")
_PRODUCT_SIGNS = ("*", r"\cdot", r"\times", "/", r"\div")
_LONGEST, _DEEPEST = 1000, 40


def same_value(first: str, second: str) -> bool | None:
    """Whether two formulas have equal values wherever their variables are; None where one of them is not read."""
    try:
        return all(_close(value(first, point), value(second, point)) for point in _points(first + second))
    except (Unreadable, ArithmeticError):  # absolute values overflow, too
        return None


def proportion(first: str, second: str) -> float | None:
    """The number by which the first formula is a multiple of the second; 0 where it is none.

    None where one of them is not read, or where they are numbers, all of which are multiples of each other.
    """
    try:
        values = [(as_complex(value(first, point)), as_complex(value(second, point))) for point in _points(first + second)]
        a, b = values[0]
        if all(_close(x, a) and _close(y, b) for x, y in values):
            return None
        if min(abs(a), abs(b)) <= 1e-9 * max(abs(number) for pair in values for number in pair):
            return 0.0
        ratio = a / b
        if abs(ratio.imag) > 1e-9 * abs(ratio) or not all(_close(x, ratio * y) for x, y in values):
            return 0.0
        return ratio.real
    except (Unreadable, ArithmeticError):
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


def _points(text: str) -> Iterator[int]:
    """Positive values; negative ones where signs are lost, large ones where differences are."""
    yield from range(POINTS)
    if "|" in text:
        yield from range(POINTS, 2 * POINTS)
    if r"\lfloor" in text or r"\lceil" in text:
        yield from range(2 * POINTS, 3 * POINTS)


def _close(first: Value, second: Value) -> bool:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    a, b = as_complex(first), as_complex(second)
    return abs(a - b) <= max(1e-12, 1e-9 * max(abs(a), abs(b)))


_BRACKETS = {"(": ")", "{": "}", "[": "]"}
_CONSTANTS: dict[str, Value] = {"i": 1j, "e": complex(math.e), r"\pi": complex(math.pi)}


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
        self.point, self.place, self.depth, self.bars = point, 0, 0, 0

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
            result = add(result, term if sign == "+" else multiply(Fraction(-1), term))
        self.depth -= 1
        return result

    def _product(self) -> Value:
        result = self._signed()
        while (token := self._next()) and token not in _ENDS and not (token == "|" and self.bars):
            if token in _PRODUCT_SIGNS:
                sign, factor = self._take(), self._signed()
                result = divide(result, factor) if sign in ("/", r"\div") else multiply(result, factor)
            elif token[0].isdigit() or token[0] == ".":
                raise Unreadable("a number behind a factor")
            else:
                result = multiply(result, self._power())
        return result

    def _signed(self) -> Value:
        if self._next() in ("+", "-"):
            sign = self._take()
            number = self._signed()
            return number if sign == "+" else multiply(Fraction(-1), number)
        return self._power()

    def _power(self) -> Value:
        base = self._atom()
        while self._next() == "!":
            self._take()
            base = factorial(base)
        if self._next() != "^":
            return base
        self._take()
        return power(base, self._group() if self._next() == "{" else self._signed_atom())

    def _signed_atom(self) -> Value:
        if self._next() != "-":
            return self._atom()
        self._take()
        return multiply(Fraction(-1), self._atom())

    def _atom(self) -> Value:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            number = Fraction(token.rstrip("."))
            return add(number, self._fraction()) if self._mixed(token) else number
        if token == r"\frac":
            self.place -= 1
            return self._fraction()
        if token == r"\sqrt":
            degree: Value = Fraction(2)
            if self._next() == "[":
                self._take()
                degree = self._sum()
                self._take("]")
            return root(self._argument(), degree)
        if token in _BRACKETS:
            inner = self._sum()
            self._take(_BRACKETS[token])
            return inner
        if token == r"\binom":
            return binomial(self._argument(), self._argument())
        if token == "|":
            return self._absolute()
        if token in _ROUNDED:
            return self._rounded(*_ROUNDED[token])
        name = re.split(r"\s*_", token)[0]
        if name in FUNCTIONS:
            return self._function(name, token)
        if name[0] != "\\" or name in _GREEK or name == r"\pi":
            return self._variable(token)
        raise Unreadable(token)

    def _variable(self, name: str) -> Value:
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        place = zlib.crc32(re.sub(r"\s", "", name).encode()) % 10_007
        size = 0.5 + math.sin(12.9898 * place + 78.233 * (self.point % POINTS)) * 43758.5453 % 2
        return complex(size * (1, -1, 97)[self.point // POINTS])

    def _absolute(self) -> Value:
        self.bars += 1
        inner = self._sum()
        self._take("|")
        self.bars -= 1
        return abs(inner) if isinstance(inner, Fraction) else complex(abs(inner))

    def _rounded(self, closing: str, to_whole: Callable[[Fraction | float], int]) -> Value:
        inner = self._sum()
        self._take(closing)
        if not isinstance(inner, Fraction) and abs(inner.imag) > 1e-12:
            raise Unreadable("rounding of a complex number")
        return Fraction(to_whole(inner if isinstance(inner, Fraction) else inner.real))

    def _function(self, name: str, token: str) -> Value:
        r"""A function of what follows: \sin^2 x, \log_{2} 8, \sin 2x\cos x."""
        exponent: Value = Fraction(1)
        if self._next() == "^":
            self._take()
            exponent = self._group() if self._next() == "{" else self._signed_atom()
        inverse = exponent == -1 and name in INVERSES
        of = self._function_argument()
        if subscript := re.search(r"_\{([^{}]*)\}", token):
            if name != r"\log":
                raise Unreadable(token)
            result: Value = logarithm(as_complex(of), as_complex(value(subscript[1], self.point)))
        else:
            result = (INVERSES if inverse else FUNCTIONS)[name](as_complex(of))
        return result if inverse or exponent == 1 else power(result, exponent)

    def _function_argument(self) -> Value:
        r"""What is in brackets, else all factors up to the next sign, bracket or function."""
        if self._next() in _BRACKETS or self._next() == "|":
            return self._atom()
        if self._next() == "-":
            return self._signed()
        argument = self._power()
        while (token := self._next()) and (token[0].isalpha() or token in _GREEK or token in (r"\pi", r"\frac", r"\sqrt")):
            argument = multiply(argument, self._power())
        if token == "/":
            self._take()
            argument = divide(argument, self._power())
        return argument

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
        return divide(above, self._argument())

    def _mixed(self, whole: str) -> bool:
        """Whether a fraction of whole numbers below one follows a whole number."""
        rest = "".join(self.tokens[self.place : self.place + 7])
        match = re.match(r"\\frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", rest)
        if not match or not whole.isdigit():
            return False
        above, below = (int(number) for number in match.groups() if number is not None)
        return 0 < above < below
