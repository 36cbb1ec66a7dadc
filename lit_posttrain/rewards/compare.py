r"""Whether two mathematical answers agree, as far as text and exact arithmetic can tell; the rest goes to a worker.

The worker's algebra forgives too much for a reward: it drops the left side of ``3=4``, ignores the base of ``1011_3``
and simplifies ``5x/x``. What it may be asked is therefore decided here.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from lit_posttrain.rewards.normalise import Answer, Literal, choice_letter, normalise, without_choice

_BASED = re.compile(r"([0-9A-Fa-f]+)\s?_\s?\{?\s?(?:\\text\{)?(\d+|two|three|eight|ten|sixteen)\}?\}?")
_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mbox)\s?\{)?\s?\(?[A-J]\)?\s?\}?")
_WORDS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mbox)\s?\{\s?([A-Za-z][A-Za-z ,'.-]*)\}|([A-Za-z][A-Za-z '-]{3,}|(?i:yes|no))"
)
_EQUALS = re.compile(r"=|\\approx(?![A-Za-z])|\\sim(?:eq)?(?![A-Za-z])")
_NAME = re.compile(
    r"(?:\([A-Za-z]\s?(?:,\s?(?:[A-Za-z]|\\theta|\\phi|\\varphi)\s?){1,3}\)|\\text\s?\{[A-Za-z ]+\}|"
    r"\\angle\s?[A-Z]{1,3}|[A-Za-z ]*[A-Za-z]|\\(?!pi|infty|emptyset)[a-z]+)"
    r"(?:_(?:\w|\{\w+\}))?'?\s?(?:\([a-z0-9, ]{1,12}\))?"
)
_FUNCTIONS = re.compile(
    r"(?<![A-Za-z])(?:arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm|inf)"
    r"(?![a-z]{2})"
)
_GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|Delta|Omega|"
    r"Gamma|Lambda|Phi|Psi|Sigma|Theta|zeta|eta|kappa|iota)(?![A-Za-z])"
)
_MACROS = re.compile(r"\\(?:begin|end)\s?\{[A-Za-z*]{1,16}\}|\\math(?:bb|cal)\s?\{[A-Za-z]\}|\\[A-Za-z]+|\\.")
_TEXT_MACRO = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname)(?=\s?\{)")
_PROSE = re.compile(r"\\(?:text[a-z]*|mbox)\s?\{")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|lt|gt)(?![A-Za-z])")
_SET = re.compile(r"[\[(].*,.*[\])]|\\\{|\\(?:cup|emptyset|infty|setminus|mathbb)(?![A-Za-z])")
_MACRO_NAME = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_FOREIGN = re.compile(r"[;:?<>~&#@\"']")
_OPERATION = re.compile(
    r"frac|sqrt|cdot|times|div|ast|d?binom|log|ln|lg|exp|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|sinh|cosh|tanh|pi|"
    r"[lr](?:floor|ceil|vert)|max|min|gcd|lcm|sum|prod|int|operatorname|overline|bar|circ|[{}|]"
)
_LOOSE = re.compile(r"[\^_]\s?(?:\{[^{}]*\}|\w)|\([0-9, ]*\)")
_TUPLE = re.compile(r"[\[(][^\[\]()]*,[^\[\]()]*[\])]")
_GAP = re.compile(r"\d\s\d")
_BOUNDED = re.compile(
    r"(?:(?P<low>[^<>]+?)\s?(?P<first><|\\le(?![a-z]))\s?)?(?P<name>[a-z])\s?(?P<last>[<>]|\\[lg]e(?![a-z]))\s?(?P<bound>[^<>]+)"
)
_POINT = re.compile(r"(?<![\d.])(\d{0,12})\.(\d{1,12})(?![\d.])")


MAX_NESTING = 24
"""Brackets within brackets; the algebra's parser takes far longer with each, and no honest answer comes near."""


class Question(NamedTuple):
    """What the worker shall find: whether every one of ``answers`` equals ``gold``."""

    gold: str
    answers: tuple[str, ...]


def compare(gold_text: str, answer_text: str) -> bool | Question:
    """True or False where text and exact arithmetic decide, else the question for the worker.

    Args:
        gold_text: The gold answer.
        answer_text: The extracted answer.
    """
    gold, answer = normalise(gold_text), normalise(answer_text)
    if not answer.core or (":" in answer.core and ":" not in gold.core):  # a ratio would be read as a fraction
        return False
    if _nesting(answer.core) > MAX_NESTING:
        return False
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    for rule in (_letters, _words, _bases, _literals, _spelling):
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    return _ask(gold, answer)


def is_decided_by_text(gold_text: str) -> bool:
    """Whether a gold answer needs no algebra to be understood.

    Args:
        gold_text: The gold answer.
    """
    gold = normalise(gold_text)
    return bool(gold.literal or _BASED.fullmatch(gold.core) or _WORDS.fullmatch(gold.core) or _is_letter(gold))


def _is_letter(gold: Answer) -> bool:
    return _LETTER.fullmatch(gold.core) is not None


def _letters(gold: Answer, answer: Answer) -> bool | None:
    if not _is_letter(gold):
        return None
    return choice_letter(answer.core) == choice_letter(gold.core)


def _words(gold: Answer, answer: Answer) -> bool | None:
    wanted = _WORDS.fullmatch(gold.core)
    if wanted is None:
        return None
    given = re.sub(r"\\(?:text\w*|mathrm|mbox)\s?|[{}]", "", answer.core)
    return _spoken(given) == _spoken(wanted.group(1) or wanted.group(2))


def _spoken(words: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", words.casefold()).split())


def _bases(gold: Answer, answer: Answer) -> bool | None:
    wanted, given = _BASED.fullmatch(gold.core), _BASED.fullmatch(answer.core)
    if wanted is None and given is None:
        return None
    if wanted is None and given is not None and given.group(2) in ("10", "ten") and gold.literal:
        return given.group(1).isdigit() and gold.literal.value == int(given.group(1))
    if wanted is None or given is None:
        return False
    return [part.lower().lstrip("0") for part in wanted.groups()] == [p.lower().lstrip("0") for p in given.groups()]


def _literals(gold: Answer, answer: Answer) -> bool | None:
    if gold.literal is None:
        return None
    given = answer.literal or normalise(without_choice(answer.core)).literal
    if given is not None:
        return equal_literals(gold.literal, given)
    core = without_choice(answer.core)
    if _GAP.search(core) or core.startswith((r"\approx", r"\sim")):
        return False
    sides = _split(core, is_number=True)[1] or [core]
    if _has_comma(core) or not all(_is_arithmetic(side) for side in sides):
        return False
    return None


def _is_arithmetic(side: str) -> bool:
    """Whether a text holds nothing but numbers and known operations: what the algebra would drop is not dropped."""
    return (
        all(_OPERATION.fullmatch(name) for name in _MACRO_NAME.findall(side))
        and not _FOREIGN.search(side)
        and not symbols(side)
        and not _TUPLE.fullmatch(side)
    )


def equal_literals(gold: Literal, given: Literal) -> bool:
    """Whether two numbers agree: exactly, or to all of at least 6 decimal places if gold's decimals never end.

    Args:
        gold: What is right.
        given: What was answered.
    """
    if gold.percent and given.percent:
        return gold.value == given.value
    if gold.meanings() & given.meanings():
        return True
    if given.places < 6 or gold.percent or given.percent:
        return False
    denominator = gold.value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator > 1 and round(gold.value, given.places) == given.value


def _spelling(gold: Answer, answer: Answer) -> bool | None:
    return True if "".join(gold.core.split()) == "".join(answer.core.split()) else None


def _split(core: str, is_number: bool = False) -> tuple[list[str], list[str]]:
    """The names and the values that an answer equates: ``x = 10/2 = 5`` gives ``[x]`` and ``[10/2, 5]``.

    Where the answer is to be a number, every side of letters alone is a name: ``x+y = 14``, ``|AB|^2 = 14``.
    """
    sides = [side.strip() for side in _EQUALS.split(core)]
    if len(sides) == 1:
        return [], sides
    names = [side for side in sides if _NAME.fullmatch(side) or (is_number and _is_letters_alone(side))]
    return names, [side for side in sides if side and side not in names]


def _is_letters_alone(side: str) -> bool:
    rest = _LOOSE.sub("", side)
    return bool(symbols(rest)) and not re.search(r"[0-9<>]", rest)


def _has_comma(core: str) -> bool:
    """Whether a comma stands outside all brackets."""
    depth = 0
    for character in core:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            return True
    return False


def _nesting(core: str) -> int:
    depth = deepest = 0
    for character in core:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def symbols(core: str) -> set[str]:
    """The variables of a formula: letters that are no function, macro, or the constants e and i.

    Args:
        core: Normalised text.
    """
    greek = set(_GREEK.findall(core))
    rest = _FUNCTIONS.sub(" ", _MACROS.sub(" ", _TEXT_MACRO.sub("", core)))
    return greek | {character for character in rest if character.isalpha() and character not in "ei"}


def _ask(gold: Answer, answer: Answer) -> bool | Question:
    core = without_choice(answer.core)
    known = symbols(gold.core)
    one_equation = not _has_comma(core) and not _has_comma(gold.core)
    gold_names, gold_values = _split(gold.core)
    names, values = _split(core, is_number=gold.literal is not None)
    if one_equation and len(gold_values) == 1 and values:
        if gold_names and names and gold_names[0].replace(" ", "") != names[0].replace(" ", ""):
            return False
        answers, wanted = tuple(values), gold_values[0]
        if "\\approx" in core and len(answers) > 1:
            answers = answers[:1]
    else:
        answers, wanted = (_members(core) if "=" not in gold.core else core,), gold.core
    if _SET.search(wanted):
        answers = tuple(_as_intervals(side) for side in answers)
    if any(_PROSE.search(side) for side in answers) and not _PROSE.search(wanted):
        return False
    extra = set().union(*(symbols(side) for side in answers)) - known
    is_set = _SET.search(wanted) and len(extra) == 1 and any(_RELATION.search(side) for side in answers)
    if extra and not is_set:
        return False
    value = normalise(wanted).literal
    if value:
        literals = [(side, normalise(side).literal) for side in answers]
        if any(literal and not equal_literals(value, literal) for _, literal in literals):
            return False
        answers = tuple(_POINT.sub(_exact, side) for side, literal in literals if not literal)
    return Question(wanted, answers) if answers else True


def _members(core: str) -> str:
    """``x = 5, x = 6`` as ``5, 6``; anything else as it is."""
    parts = [_split(part.strip()) for part in core.split(",")]
    names = {name.replace(" ", "") for found, _ in parts for name in found}
    if len(names) != 1 or any(len(values) != 1 for _, values in parts):
        return core
    return ", ".join(values[0] for _, values in parts)


def _as_intervals(core: str) -> str:
    r"""``x<2, x \ge 3`` as ``(-\infty,2)\cup[3,\infty)``; anything else as it is."""
    found = [_BOUNDED.fullmatch(part.strip()) for part in core.split(",")]
    intervals = []
    for match in found:
        if match is None or match.group("name") != (found[0] and found[0].group("name")):
            return core
        strict, bound, low = match.group("last") in "<>", match.group("bound"), match.group("low")
        if match.group("last") in (">", "\\ge"):
            if low:
                return core
            intervals.append(f"{'(' if strict else '['}{bound},\\infty)")
        else:
            left = f"{'(' if match.group('first') == '<' else '['}{low}" if low else "(-\\infty"
            intervals.append(f"{left},{bound}{')' if strict else ']'}")
    return "\\cup ".join(intervals)


def _exact(match: re.Match[str]) -> str:
    r"""``1.5`` as ``(\frac{15}{10})``: the worker rounds decimals before it compares, which is no equality."""
    value = Fraction(int(match.group(1) + match.group(2) or 0), 10 ** len(match.group(2)))
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"
