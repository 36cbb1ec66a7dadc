r"""Which part of a completion is its answer. Never "the last number in the text".

Everything here reads hostile text inside the trainer's process, so every scan is linear in the length of the text:
no nested or adjacent unbounded quantifiers in the patterns.

The order: what stands after ``</think>``; there the one closed ``<answer>`` block; there the last closed ``\boxed``;
without any box ``the answer is ...`` or ``#### ...``. A completion that is cut off, contradicts itself without an
explicit correction, negates or takes back what it says, or hides a box, has no answer.
"""

import re
from typing import Literal, NamedTuple

from lit_posttrain.types import Sample

ExtractFrom = Literal["answer_tag", "boxed", "auto"]

MAX_ANSWER = 2000
"""Characters; a longer answer is nobody's answer."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,4}")
_BRACE = re.compile(r"\\[\s\S]|[{}]")
_GROUPS = re.compile(
    r"(?P<hides>\\(?:[hv]?phantom|[bx]?cancel|sout|st|textcolor\{white\})\s{0,4}\{)|\\[\s\S]|[{}]",
)
_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)
_STATEMENT = re.compile(
    r"(?:\banswer(?:\s{1,4}to\s[^.\n]{0,60}?)?(?:\s{1,4}(?:is|equals)\b|\*{0,2}\s{0,4}:)|####)"
    r"(?:\s{0,4}(?:therefore|thus)\b,?)?[\s:*=]{0,8}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|\.(?=\s|$|\*|\")|(?<!\\);|</?[A-Za-z]{1,10}>|,?\s(?:because|since|not)\b")
_CORRECTION = re.compile(
    r"\b(?:wait|oops|actually|correction|corrected|correcting|mistake|mistaken|error|scratch that|sorry|"
    r"instead|on second thought|re-?check\w*|re-?comput\w*|re-?calculat\w*|re-?consider\w*|double[- ]check\w*|"
    r"that(?:'s| is| was) (?:wrong|not right|incorrect)|the correct|let me (?:re)?(?:do|try|check|think|verify))\b",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"\b(?:wait(?:[,.!:…]|\s(?:no|a|that)\b)|oops|actually,|no, |scratch that|on second thought|my mistake\b|"
    r"(?:i|we) (?:have )?(?:made|make) (?:a|an) (?:mistake|error)|(?:i'm|i am) (?:not|un)|not (?:so |really )?sure|"
    r"(?:i'm|i am) (?:just )?guessing|just a guess|g[ai]ve up|giv(?:e|ing) up|disregard|"
    r"or (?:maybe|perhaps|possibly|is it|could it)|ignore (?:that|this|the)|"
    r"(?:that|this|it|which|answer|above)(?:'s| is| was| may be| might be| could be) "
    r"(?:wrong|incorrect|not (?:correct|right|the answer|it))|"
    r"(?:could|might|may)(?: also| instead| well)? be (?:[\d$]|\\\(|something|another|different|wrong))",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:\b(?:not|never|isn't|isn’t|wasn't|cannot be|can't be|neither|nor|other than|different from|unlike|instead of|"
    r"rather than|except|exclud\w{1,5}|ruled? out|either|maybe|perhaps|possibly)\b|\\neq?|≠|!=)"
    r"(?:\s{1,4}(?:be|is|the|equal|equals|to|really|just|simply|actually|number|value|answer)){0,3}[\s:,$(\[*\\]{0,8}$",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[\s$,*]{0,12}(?:(?:and|or)[\s$*]{0,12})?", re.IGNORECASE)


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def extract_answer(
    completion: str, source: ExtractFrom = "auto", stop_reason: Literal["stop", "length"] = "stop"
) -> str | None:
    r"""The text of the answer that a completion gives, or None where it gives none.

    Args:
        completion: The whole completion, prefill included.
        source: ``answer_tag``: only what stands in ``<answer>..</answer>``; ``boxed``: only a ``\boxed``;
            ``auto``: the tag if there is one, else the box, else ``answer is`` or ``####``.
        stop_reason: ``length`` never has an answer: what was cut off might have been taken back.
    """
    if stop_reason != "stop":
        return None
    text = _after_thinking(completion)
    if text is None:
        return None
    if source == "boxed":
        return _clean(_from_boxes(text.replace("<answer>", "").replace("</answer>", "")))
    tags = list(_TAG.finditer(text))
    if tags:
        return _clean(_from_tag(text, tags))
    if source == "answer_tag":
        return None
    return _clean(_from_boxes(text) if _BOX.search(text) else _from_statement(text))


def sample_answer(sample: Sample, source: ExtractFrom) -> str | None:
    """``extract_answer`` of a sample.

    Args:
        sample: Whose completion is read.
        source: Where the answer must stand.
    """
    return extract_answer(sample.completion, source, sample.stop_reason)


def _clean(answer: str | None) -> str | None:
    answer = answer.strip() if answer is not None else None
    return answer if answer and len(answer) <= MAX_ANSWER else None


def _after_thinking(text: str) -> str | None:
    """What follows the last ``</think>``; None while the thinking was never closed."""
    marks = list(_THINK.finditer(text))
    if not marks:
        return text
    return text[marks[-1].end() :] if marks[-1].group(1) else None


def _from_tag(text: str, tags: list[re.Match[str]]) -> str | None:
    if [tag.group().lower() for tag in tags] != ["<answer>", "</answer>"]:
        return None
    inner, after = text[tags[0].end() : tags[1].start()], text[tags[1].end() :]
    if _BOX.search(after) or _STATEMENT.search(after) or _RETRACTION.search(after):
        return None
    if _BOX.search(inner):
        return _from_boxes(inner)
    return _from_statement(inner) if _STATEMENT.search(inner) else inner


def _boxes(text: str) -> list[_Box] | None:
    """The outermost closed boxes in order; None if one is unclosed."""
    found, position = [], 0
    while match := _BOX.search(text, position):
        end = _closing(text, match.end())
        if end is None:
            return None
        found.append(_Box(match.start(), end + 1, text[match.end() + 1 : end]))
        position = end + 1
    return found


def _closing(text: str, start: int) -> int | None:
    r"""Where the group opened at ``start`` closes; ``\{`` and ``\}`` are no braces."""
    if text[start : start + 1] != "{":
        return None
    depth = 0
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _unwrap(content: str) -> str:
    r"""The content of a box without boxes around all of it: ``\boxed{\boxed{5}}``."""
    for _ in range(8):
        inner = _boxes(content.strip(" $")) if _BOX.match(content.strip(" $")) else None
        if not inner or inner[0].end != len(content.strip(" $")):
            return content
        content = inner[0].content
    return content


def _from_boxes(text: str) -> str | None:
    boxes = _boxes(text)
    if not boxes or _is_hidden(text, boxes[-1].start) or _RETRACTION.search(text, boxes[-1].end):
        return None
    run = [_unwrap(boxes[-1].content)]  # the last boxes, as long as only "and", "or" or a comma stands between them
    known, joining = {_bare(run[0])}, True
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between, content = text[before.end : after.start], _unwrap(before.content)
        joining = joining and len(between) <= 40 and _JOINED.fullmatch(between) is not None
        if joining:
            run.append(content)
            known.add(_bare(content))
        elif _bare(content) not in known:
            if not _CORRECTION.search(between):
                return None
            break  # explicitly corrected: what was said before no longer counts
    first = boxes[-len(run)].start
    if _NEGATION.search(text[max(0, first - 80) : first]):
        return None
    return run[0] if len(known) == 1 else ", ".join(reversed(run))


def _is_hidden(text: str, position: int) -> bool:
    """Whether a position lies inside a group that is not shown or is crossed out, or inside an HTML comment."""
    depth, hidden = 0, []
    for match in _GROUPS.finditer(text, 0, position):
        if match.group("hides") or match.group() == "{":
            depth += 1
            if match.group("hides"):
                hidden.append(depth)
        elif match.group() == "}":
            if hidden and hidden[-1] == depth:
                hidden.pop()
            depth = max(depth - 1, 0)
    return bool(hidden) or text.rfind("<!--", 0, position) > text.rfind("-->", 0, position)


def _bare(content: str) -> str:
    return "".join(content.split()).strip("$.")


def _from_statement(text: str) -> str | None:
    """What the last ``answer is`` or ``####`` names; different ones need a correction between them."""
    found: list[tuple[int, int, str]] = []
    position = 0
    while match := _STATEMENT.search(text, position):
        stop = _SENTENCE_END.search(text, match.end())
        position = stop.start() if stop else len(text)
        position = max(position, match.end())
        found.append((match.start(), position, text[match.end() : position]))
    if not found or _RETRACTION.search(text, found[-1][1]):
        return None
    last = _peel(found[-1][2])
    for (_, end, before), (start, _, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        if _peel(before) != last:
            if not _CORRECTION.search(text, end, start):
                return None
            break
    return None if not last or _NEGATION.search(last[:40] + " ") or _negated(last) else last


def _negated(answer: str) -> bool:
    first = answer.split(maxsplit=1)[0].lower()
    return first in {"not", "never", "either", "neither", "maybe", "perhaps", "possibly", "unknown", "unclear"}


def _peel(answer: str) -> str:
    """Without the marks that surround an answer in prose."""
    answer = answer.strip().strip("*`\"'").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if answer.startswith(opening) and opening in answer and closing in answer[len(opening) :]:
            inside, _, rest = answer[len(opening) :].partition(closing)
            return inside.strip() if not rest.strip(" .,*") else answer
    return answer.rstrip(".,:* ")
