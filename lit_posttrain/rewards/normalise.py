r"""Mathematical answers as text: one spelling for each meaning, and exact values where the text is a number.

Reads hostile text inside the trainer's process: it never evaluates anything, and numbers are bounded in length.
"""

import re
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 4000
"""Longest number that is read, in digits; Python itself refuses to convert more than 4,300."""
MAX_EXPONENT = 400

_UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∞": r"\infty ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ",
    "∈": r"\in ", "°": r"^\circ ", "√": r"\sqrt ", "±": r"\pm ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "²": "^2", "³": "^3", "¹": "^1", "⁴": "^4", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "，": ",", "∕": "/",
}  # fmt: skip
_VULGAR = {"½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
           "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8)}  # fmt: skip
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathsf|mbox|operatorname)\s?\{"
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:,?(?<!\\)\\[,;:! ]|\{,\})(?=\d{3}(?!\d))", ""),  # 1\,234 and 1,\!234 and 1{,}234
        (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![A-Za-z])|$)", " "),
        (r"~", " "),
        (rf"^{_TEXT}\s?(\d[^{{}}]*)\}}$", r"\1"),
        (r"\\(?:text)?color\s?\{\w{1,16}\}|\\underline(?![A-Za-z])", ""),
        (r":=", "="),
        (_TEXT + r"\s?([+-]?[\d.,]+%?)\s?\}", r"\1"),
        (r"\\(?:left|right|displaystyle|textstyle|bigl?|bigr?|Bigl?|Bigr?|limits)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\varnothing(?![A-Za-z])|\\\{\s{0,3}\\\}", r"\\emptyset "),
        (r"\\(?:le|leq|leqslant)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:ge|geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:ne|neq)(?![A-Za-z])|!=", r"\\ne "),
        (r"\^\{?\s?\\circ\s?\}?|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"\\sqrt\s+(?=\d)(\d+)", r"\\sqrt{\1}"),
        (r"\\sqrt\s+\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s+([A-Za-z])(?![A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(sqrt|pi|infty)(?![A-Za-z])", r"\\\1"),
        (r"\\(\$|%)", r"\1"),
        (rf"(?<=\d)\s?(?:{_TEXT}\s?(?:percent|per cent)\s?\}}|(?:percent|per cent|pct)\b)", "%"),
        *(
            (rf"(?<=\d)\s?(?:{_TEXT}\s?{word}\s?\}}|{word}\b)", rf"\\times 10^{power}")
            for word, power in (("thousand", 3), ("million", 6), ("billion", 9))
        ),
        (rf",?\s?(?:{_TEXT}\s{{0,3}}(?:and|or)\s{{0,3}}\}}|\b(?:and|or)\b)\s?", ", "),
        (r"\s+", " "),
    )
)
_ENDS = " \t.,:;"
_STARTS = " \t,:;"  # no full stop: .5 is a number
_CHOICE = re.compile(rf"(?:{_TEXT})?\s?\(?([A-J])\)?\.?\s?(?:\}}|(?=$))|(?:{_TEXT})?\s?\(?([A-J])(?:\)|\.\s)\.?\s?\}}?")
_UNIT = re.compile(
    rf"\s?(?:{_TEXT}\s?(?P<text>[A-Za-z][A-Za-z ./]{{0,40}})\.?\s?\}}|\s(?P<word>[A-Za-z][A-Za-z ./]{{0,40}}))"
    r"\.?(?P<power>\^\{?[23]\}?)?$"
)
_ABBREVIATED = {"m", "g", "s", "h", "l", "L", "N", "J", "W", "V", "K", "C", "F"}
_NOT_UNITS = re.compile(
    "or|and|not|maybe|perhaps|possibly|if|about|approximately|nor|to|x|times|plus|minus|over|by|thousand|million|"
    "billion|trillion|hundred|dozen|half|third|quarter|percent|squared|cubed|factorial|base|mod|choose|pi|root|is|"
    "i|e|the|than|no|none|only|unless|except|hundredths|tenths|thousandths|zero|one|two|three|four|five|six"
)
_INTEGER = re.compile(r"([+-]?)\s?(\d{1,3}(?:[, ]\d{3})+|\d+)(?:\.0*)?")
_DECIMAL = re.compile(r"(\d{1,3}(?:[, ]\d{3})+|\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,4}))?")
_POWER_OF_TEN = re.compile(r"(.*?)\s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?(?:\{\s?([+-]?\d{1,4})\s?\}|(\d))")
_REPEATING = re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar)\s?\{(\d{1,20})\}")
_FRACTION = re.compile(
    r"(?:(\d+)\s?)?\\frac\s?(?:\{\s?([+-]?\d+)\s?\}|(\d))\s?(?:\{\s?(\d+)\s?\}|(\d))|(?:(\d+)\s)?(\d+)\s?/\s?(\d+)"
)


_GROUPING = str.maketrans("", "", ", ")


class Literal(NamedTuple):
    """A number written out.

    Attributes:
        value: Exactly what is written, before a percent sign is applied.
        percent: A percent sign follows.
        places: Digits after the decimal point; 0 for integers and fractions.
    """

    value: Fraction
    percent: bool = False
    places: int = 0

    def meanings(self) -> set[Fraction]:
        """The values it may stand for: a percentage is also its hundredth."""
        return {self.value, self.value / 100} if self.percent else {self.value}


class Answer(NamedTuple):
    """An answer in its one spelling.

    Attributes:
        core: LaTeX without units, spacing macros and closing punctuation.
        unit: Unit that was taken off, lower case, singular; empty if none.
        literal: Its value if it is a number written out.
    """

    core: str
    unit: str = ""
    literal: Literal | None = None

    def vote(self) -> str:
        """One spelling for equal answers, as far as text can tell."""
        return str(self.literal.value) if self.literal else "".join(self.core.split())


def normalise(text: str) -> Answer:
    """Brings an answer into its one spelling.

    Args:
        text: The answer as extracted, at most a few thousand characters.
    """
    text = "".join(_UNICODE.get(character, character) for character in text)
    for character in _VULGAR.keys() & set(text):
        above, below = _VULGAR[character]
        text = text.replace(character, rf"\frac{{{above}}}{{{below}}}")
    text = unwrap(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = unwrap(text.rstrip(_ENDS).lstrip(_STARTS))
    text, unit = _take_unit(text)
    text = text.rstrip(_ENDS).lstrip(_STARTS)
    return Answer(text, unit, parse_literal(text))


def unwrap(text: str) -> str:
    """Without what surrounds a whole formula: dollars, brackets of display mode, bold marks, braces.

    Args:
        text: A formula.
    """
    for _ in range(6):
        text = text.strip()
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`")):
            inner = text[len(left) : len(text) - len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                if left not in inner and right not in inner:
                    text = inner
                break
        else:
            if not (text.startswith("{") and text.endswith("}") and _closes_last(text)):
                return text
            text = text[1:-1]
    return text


def _closes_last(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _take_unit(text: str) -> tuple[str, str]:
    r"""Splits "5\text{ cm}" and "5 apples"; words that change the value (or, thousand, minus) are no units."""
    if text[:1] in ("$", "€", "£") and parse_literal(text[1:]):
        return text[1:], "dollar" if text[0] == "$" else text[0]
    if text.endswith(r"^\circ"):
        return text[: -len(r"^\circ")], "degree"
    match = _UNIT.search(text, max(0, len(text) - 80))
    before = text[: match.start()].rstrip() if match else ""
    if (
        not match
        or not before
        or before[-1] in "+-*/=^_(,<>"
        or not (match.group("text") or before[-1] in "0123456789})%")
    ):
        return text, ""
    words = re.split(r"[\s./]+", (match.group("text") or match.group("word")).strip(" ./"))
    if len(words) > 3 or any(_NOT_UNITS.fullmatch(w.lower()) or (len(w) == 1 and w not in _ABBREVIATED) for w in words):
        return text, ""
    unit = " ".join(word.lower().rstrip("s") or word for word in words) + (match.group("power") or "").strip("^{}")
    return text[: match.start()], {"usd": "dollar", "deg": "degree"}.get(unit, unit)


def parse_integer(text: str) -> int | None:
    r"""The integer that a text is; None if it is anything else or longer than ``MAX_DIGITS``.

    Args:
        text: ``25``, ``025``, ``-1,234``, ``204.``, ``$1\,234$``.
    """
    core = normalise(text).core
    match = _INTEGER.fullmatch(core) if core.isascii() else None
    digits = match.group(2).translate(_GROUPING) if match else ""
    return int(match.group(1) + digits) if match and len(digits) <= MAX_DIGITS else None


def parse_literal(text: str) -> Literal | None:
    """The exact value of a number written out: integer, decimal, scientific, fraction, mixed number, percentage.

    Args:
        text: Normalised text.
    """
    text = text.strip()
    if not text.isascii() or len(text) > 2 * MAX_DIGITS:
        return None
    percent = text.endswith("%")
    text = text.rstrip("%").strip() if text.count("%") == 1 else text
    sign = -1 if text.startswith("-") else 1
    text = unwrap(text[1:].strip() if text[:1] in ("-", "+") else text)
    if text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    if match := _FRACTION.fullmatch(text):
        value = _fraction(match)
        return Literal(sign * value, percent) if value is not None else None
    if match := _REPEATING.fullmatch(text):
        return _repeating(sign, percent, *match.groups())
    exponent = 0
    if match := _POWER_OF_TEN.fullmatch(text):
        text, exponent = match.group(1), int(match.group(2) or match.group(3))
    match = _DECIMAL.fullmatch(text)
    whole, places = (match.group(1).translate(_GROUPING), match.group(2) or "") if match else ("", "")
    if match is None or not whole + places or len(whole + places) > MAX_DIGITS:
        return None
    exponent += int(match.group(3) or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    return Literal(
        sign * Fraction(int(whole + places)) * Fraction(10) ** (exponent - len(places)), percent, len(places)
    )


def _repeating(sign: int, percent: bool, whole: str, fixed: str, period: str) -> Literal:
    r"""``0.8\overline{3}``: the period weighs 10^p - 1."""
    value = Fraction(int(whole + fixed or "0")) + Fraction(int(period), 10 ** len(period) - 1)
    return Literal(sign * value / 10 ** len(fixed), percent)


def _fraction(match: re.Match[str]) -> Fraction | None:
    whole, above, below = (
        match.group(1) or match.group(6),
        match.group(2) or match.group(3) or match.group(7),
        match.group(4) or match.group(5) or match.group(8),
    )
    if max(len(whole or ""), len(above), len(below)) > MAX_DIGITS or int(below) == 0:
        return None
    part = Fraction(int(above), int(below))
    if whole is None:
        return part
    return int(whole) + part if 0 <= part < 1 else None  # a mixed number; 3 3/2 is not one


def choice_letter(text: str) -> str | None:
    r"""The letter of a multiple-choice answer: ``C``, ``(C)``, ``\textbf{(C)}\ 12``.

    Args:
        text: Normalised text.
    """
    match = _CHOICE.match(text)
    return (match.group(1) or match.group(2)) if match else None


def without_choice(text: str) -> str:
    r"""What follows the letter: ``12`` of ``\textbf{(C)}\ 12``; the text itself where no letter in brackets leads.

    Args:
        text: Normalised text.
    """
    match = re.match(rf"(?:{_TEXT})?\s?\(?[A-J](?:\)|\.\s)\.?\s?\}}?\s?(?=\S)", text)
    return text[match.end() :] if match else text
