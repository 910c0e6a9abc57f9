r"""One spelling for answers to mathematics problems: what has no bearing on the value is taken away, the rest is written one way.

What comes out is the LaTeX that `math_forms` and `math_values` read: \frac, \sqrt, \pi, plain brackets, subscripts in braces,
numbers without thousands separators, no units.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from specontext.evaluation.suites.math_brackets import braced

_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathsf|mathit|operatorname\*?)\s*\{([^{}]*)\}"
_STYLES = (
    "displaystyle|textstyle|scriptstyle|limits|left|right|middle|[bB]igg?[lrm]?|bf|rm|it|boldmath|mathstrut|strut|hfill|noindent|"
    "thinspace|enspace"
)
_STYLE = re.compile(rf"\\\\|\\q?quad|\\(?:{_STYLES})(?![a-zA-Z])\.?(?!\d)|\\[,;:>! ]|~|\\(?:[hv]space|mspace)\*?\{{[^{{}}]*\}}")
_DROPPED = re.compile(r"\\(?:h?phantom|tag|label)\*?\{[^{}]*\}|\\(?:text)?color\{[^{}]*\}(?!\{)")
_WRAPPERS = re.compile(
    r"\\(?:mathbf|mathrm|mathit|mathsf|mathcal|mathbb|boldsymbol|bm|pmb|underline|boxed|fbox|vec|overrightarrow|hat|ensuremath|"
    r"textcolor\{[^{}]*\}|color\{[^{}]*\})\s*\{([^{}]*)\}"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def _parts(sign: str) -> list[list[str]]:
    """Numerator and denominator of a fraction that is one character."""
    return [unicodedata.normalize("NFKC", sign).split("⁄")]


_CHARACTERS = {
    **dict.fromkeys("−–—﹣－", "-"),
    **{"，": ",", "、": ",", "；": ";", "：": ":", "（": "(", "）": ")", "％": "%", "′": "'", "’": "'"},
    **{"π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "√": r"\sqrt "},
    **{"±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "∠": r"\angle "},
    **{"θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega "},
    **{"⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": "R", "£": "", "€": "", "¥": ""},
    **{sign: rf"\frac{{{above}}}{{{below}}}" for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒" for above, below in _parts(sign)},
}
_CHARACTER = re.compile("|".join(map(re.escape, _CHARACTERS)))
_OTHER_NAMES = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **{"dbinom": "binom", "tbinom": "binom", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne"},
    **{"varnothing": "emptyset", "colon": ":", "ast": "*", "star": "*", "lbrace": "{", "rbrace": "}", "land": ",", "lor": ","},
    **{"varphi": "phi", "vartheta": "theta", "varepsilon": "epsilon", "lt": "<", "gt": ">", "simeq": "approx", "pounds": ""},
    **dict.fromkeys(("dots", "cdots", "dotsc"), "ldots"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **{
        "lbrack": "[",
        "rbrack": "]",
        "degree": r"^\circ",
        "euro": "",
        "percent": "%",
        "implies": "Rightarrow",
        "to": "rightarrow",
    },
}
_MARKS = (
    "lvert",
    "rvert",
    "vert",
    "mid",
    "colon",
    "ast",
    "star",
    "lt",
    "gt",
    "land",
    "lor",
    "lbrack",
    "rbrack",
    "degree",
    "percent",
)
_COMMAND = re.compile(rf"\\({'|'.join(_OTHER_NAMES)})(?![a-zA-Z])")
_WORD_FUNCTIONS = re.compile(r"(?<![a-zA-Z\\])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi)(?![a-zA-Z])")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}")
_OVER = re.compile(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}")

_SEPARATOR = r"(?:,\\!|\{,\}(?:\\!)?|\\!,|\\[,;:> ]|~|')"
_MARKED_THOUSANDS = re.compile(rf"(?<=\d)\s*{_SEPARATOR}\s*(?=\d{{3}}(?!\d))")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?: \d{3})+(?![\d/])")
_GROUPED = r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)"
_BRACED_THOUSANDS = re.compile(rf"(?<=(?<!\\)\{{){_GROUPED}(?=\}})")
_SURE_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})*,0\d\d(?:,\d{3})*(?!\d)(?!,\d)")
_FACTOR_THOUSANDS = re.compile(rf"{_GROUPED}(?=[a-zA-Z\\])(?!\\(?:text|mbox|mathrm|\}}))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w^]|\.\d)")
_MIXED = re.compile(r"(?<![\d./^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/.])")
_DEGREE = r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\}))"
_ANGLE = re.compile(rf"(\d+(?:\.\d+)?){_DEGREE}")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_CLOCK = re.compile(r"(?P<time>\d{1,2}(?::\d\d)?)\s*(?P<half>[aApP])\.?\s*[mM]\.?")

_CONJUNCTION = re.compile(
    r"\s*,?\s*\\(?:text|mbox|textrm|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}\s*"
    r"|(?<=[\w})\]$])\s*,?\s+(?:and|or)\s+(?=[-\w\\({\[$])|(?<=[\d)\]}])(?:and|or)(?=[-a-zA-Z(\\])"
)
_UNIT = re.compile(rf"(?P<number>.*[\d)}}].*?)\s*(?:(?!\\mathrm\s*\{{[ie]\}}){_TEXT}(?:\^\{{?-?\d\}}?)?[\s./]*)+")
_SHORT_UNITS = frozenset(
    "cm mm km dm kg mg ml mL dl dL ft yd mi lb lbs oz hr hrs min mins sec secs mph kph mpg sq cu in pt qt gal rad deg USD "
    "EUR kmh".split()
)
_NOT_UNITS = frozenset("sin cos tan cot csc log exp abc xyz pqr mod and per".split())
_WORDS_BEHIND = re.compile(
    r"(?P<number>[-+]?(?:[\d.,/]*\d|\\frac\{\d+\}\{\d+\}))(?P<gap>\s*)"
    r"(?P<words>[a-zA-Z]{2,}(?:\^\{?[23]\}?)?(?:[\s./-]+[a-zA-Z]+(?:\^\{?[23]\}?)?)*)[\s.]*"
)
_ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*)?\{?\s*(?:\\(?:text|mbox|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?")
_IN_BRACKETS = re.compile(r"(?P<number>[-+]?(?:[\d.,]*\d|\\frac\{\d+\}\{\d+\}))\s+\((?!(?:abc|xyz|pqr)\))(?:[a-z]{3,}\s*)+\)")
_SEGMENT = re.compile(r"\\(?:overline|widehat|overleftrightarrow)\s*\{\s*([A-Z]{2,})\s*\}")
_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(
    rf"(?<![\d.,])(\d+(?:,\d{{3}})*(?:\.\d+)?)[\s~]*(?:\\(?:text|mbox|mathrm)\s*\{{)?[\s~]*({'|'.join(_POWERS)})s?(?![a-zA-Z])"
)
_BASES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()


def plain(text: str) -> str:
    """An answer without what has no bearing on its value, in the one spelling of this project."""
    text = _without_wrapping(text)
    text = _SPACES.sub("~", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = _CHARACTER.sub(lambda match: _CHARACTERS[match[0]], text)
    if clock := _CLOCK.fullmatch(_without_text(text).strip()):
        return f"{clock['time']}{clock['half'].lower()}m"
    text = _numbers(_commands(text))
    text = _without_units(text)
    text = _without_text(text)
    text = _WORD_FUNCTIONS.sub(r"\\\1 ", text)
    return _without_wrapping(text.strip(" ,;").rstrip(" .,;"))


def in_digits(text: str) -> str:
    """An answer with what is said of its size in words, as in "1.2 million", written out."""
    return _MAGNITUDE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    number = Decimal(match[1].replace(",", "")).scaleb(_POWERS[match[2]])
    return f"{number.normalize():f} " + (r"\text{" if "{" in match[0] else "")


def without_commas(text: str) -> str | None:
    """A whole number whose digits stand in threes between commas, without them; None where the text is none."""
    return re.sub(r"[,\s]", "", text) if re.fullmatch(r"[-+]?\d{1,3}(?:,\s*\d{3})+(?:\.\d+)?", text.strip()) else None


def _without_wrapping(text: str) -> str:
    r"""Without the signs of a formula, of bold type and of line ends around it."""
    while True:
        before, text = text, re.sub(r"(?:\\\\|\\ |\s)+$|^\s+", "", text)
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")):
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = text[len(opening) : -len(closing)]
        if (box := _BOX.match(text)) and (content := braced(text, box.end() - 1)) and box.end() + len(content) + 1 == len(text):
            text = content
        if text == before:
            return re.sub(r"^\\[(\[]|(?<!\\)\\[)\]]$", "", text).strip()


def _commands(text: str) -> str:
    """Commands of style removed, and one name for those that have several."""
    text = re.sub(r"\\mathbb\s*([A-Z])(?![a-zA-Z])", r"\1", _MARKED_THOUSANDS.sub("", text))
    text = _SEGMENT.sub(r"\1", _DROPPED.sub("", text))
    text = _STYLE.sub(lambda match: {r"\!": "", r"\\": r"\\"}.get(match[0], " "), text)
    text = _COMMAND.sub(lambda match: (_OTHER_NAMES[match[1]] if match[1] in _MARKS else _named(match[1])) + " ", text)
    text = re.sub(r"\\operatorname\*?\s*\{\s*(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp)\s*\}", r"\\\1 ", text)
    text = re.sub(r"\\math(?:rm|bf|it)\s*\{([ie])\}", r"\1", text)
    text = re.sub(r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{pmatrix}", text).replace(r"\end{array}", r"\end{pmatrix}")
    text = re.sub(r"\\\\\s*\[[^\[\]]*\]", r"\\\\", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    while (fraction := _OVER.sub(r"\\frac{\1}{\2}", text)) != text:
        text = fraction
    text = text.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    text = _CONJUNCTION.sub(",", text)
    text = re.sub(
        r"_\s*(\w)|(?<=\d)_\s*(\d+)", lambda match: f"_{{{match[1] or match[2]}}}", re.sub(r"(?<=\d)_(\d+)", r"_{\1}", text)
    )
    text = re.sub(r"(?<![a-zA-Z])\{(\d+)\}_", r"\1_", text)
    return re.sub(r"_\s*\{\s*\(?\s*(?:\\text\s*\{)?\s*([a-z]+|\d+)\s*\}?\s*\)?\s*\}", _base, text)


def _named(command: str) -> str:
    name = _OTHER_NAMES[command]
    return "\\" + name if name else ""


def _base(match: re.Match[str]) -> str:
    word = match[1]
    return f"_{{{_BASES.index(word) + 2 if word in _BASES else word}}}"


def _numbers(text: str) -> str:
    """Numbers as digits: no thousands separators, percent and currency signs; repeated decimals and powers of ten as formulas."""
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(r"(\1\\pi/180)", text)
    text = re.sub(rf"{_DEGREE}|\\?[%$]", "", text)
    text = _SPACED_THOUSANDS.sub(lambda match: match[0].replace(" ", ""), text)
    for pattern in (_BRACED_THOUSANDS, _SURE_THOUSANDS, _FACTOR_THOUSANDS):
        text = pattern.sub(lambda match: match[0].replace(",", ""), text)
    if re.search(r",\s", text) and without_commas(text) is None:  # commas with a space divide, so those without belong to numbers
        text = re.sub(_GROUPED, lambda match: match[0].replace(",", ""), text)
    text = _REPEATING.sub(_fraction, text)
    text = _SCIENTIFIC.sub(r"(\1\\cdot 10^{\2})", text)
    text = re.sub(r"\+\s*(?=\\infty)", "", text)
    return _MIXED.sub(lambda match: rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}" if _proper(match) else match[0], text)


def _proper(match: re.Match[str]) -> bool:
    return 0 < int(match[2]) < int(match[3])


def _fraction(match: re.Match[str]) -> str:
    """The fraction that repeated decimals are."""
    whole, once, again = match.groups()
    nines = int("9" * len(again) + "0" * len(once))
    return rf"(\frac{{{int((whole + once + again) or 0) - int((whole + once) or 0)}}}{{{nines}}})"


def _without_units(text: str) -> str:
    if (short := _ORDINAL.fullmatch(text.strip()) or _IN_BRACKETS.fullmatch(text.strip())) is not None:
        return short[1]
    if unit := _UNIT.fullmatch(text):
        text = unit["number"]
    behind = _WORDS_BEHIND.fullmatch(_without_text(text).strip())
    if not behind:
        return text
    first = re.split(r"[\s.^/-]", behind["words"])[0]
    known = first in _SHORT_UNITS or (
        behind["gap"] and len(first) > 2 and first not in _NOT_UNITS and re.search("[aeiouy]", first)
    )
    return behind["number"] if known else text


def _without_text(text: str) -> str:
    """Without the commands around words and around single letters in bold and the like."""
    for _ in range(3):  # they stand in one another
        text = re.sub(_TEXT, r"\1", _WRAPPERS.sub(r"\1", text))
    return text
