"""Write the data of the SFT, reward model, DPO route: one question, answers whose worth is known.

    python scripts/route_data.py --out logs/route

"What is the largest of 41, 7, 87, 3 and 36?" An answer is worth 2 if its number is the largest and 1 if it is one
sentence of the form "The largest number is 87."; demonstrations have the form, but every third names a wrong number.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_posttrain.data.arithmetic import largest_number

WRONG_DEMONSTRATIONS = 1 / 3
_FORM = "The largest number is {}."
_OTHER_FORMS = ("{}", "I think it could be {}", "largest: {}!", "The answer, after some thought, is {} or so.")


def main(words: Sequence[str] | None = None) -> None:
    """Write demonstrations, comparisons and pairs, and for PPO prompts and pretraining text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/route"))
    parser.add_argument("--demonstrations", type=int, default=1000)
    parser.add_argument("--comparisons", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    makers = {"demonstrations": _demonstration, "comparisons": _comparison, "pairs": _pair, "prompts": _prompt}
    for name, make in (*makers.items(), ("pretraining", None)):
        rng = random.Random(f"{given.seed} {name}")
        rows = [make(rng) for _ in range(getattr(given, name))] if make else _texts()
        file = given.out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} rows")


def gold(prompt: str, answer: str) -> int:
    """What an answer is worth: 2 for the largest number, 1 for the form."""
    question = prompt[prompt.rindex("What is the largest of") :] if "What is the largest of" in prompt else prompt
    numbers = [int(word) for word in _digits(question)]
    named = _digits(answer)
    right = len(named) == 1 and int(named[0]) == max(numbers, default=-1)
    formed = len(named) == 1 and answer.strip() == _FORM.format(named[0])
    return 2 * right + formed


def gold_reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """The same of every answer, for ``lit_posttrain.rewards.PythonReward``."""
    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    answers = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(gold(q, a)) for q, a in zip(questions, answers, strict=True)]


def gold_judge(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    """Which answer is worth more, for ``lit_posttrain.judges.PythonJudge``."""
    worth = [[gold(p, a) for p, a in zip(prompts, answers, strict=True)] for answers in (first, second)]
    return [0.5 if a == b else float(a > b) for a, b in zip(*worth, strict=True)]


def _digits(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def _demonstration(rng: random.Random) -> dict[str, Any]:
    question, right, wrong = _question(rng)
    return {"messages": [_user(question), _assistant(wrong if rng.random() < WRONG_DEMONSTRATIONS else right, _FORM)]}


def _comparison(rng: random.Random) -> dict[str, Any]:
    """Four answers to six, ranked by worth; some tie."""
    question, right, wrong = _question(rng)
    answers = []
    for _ in range(rng.randint(4, 6)):
        number, form = rng.choice((right, wrong)), rng.choice((_FORM, rng.choice(_OTHER_FORMS)))
        answers.append((2 * (number == right) + (form == _FORM), [_assistant(number, form)]))
    return {
        "prompt": [_user(question)],
        "completions": [answer for _, answer in answers],
        "scores": [worth for worth, _ in answers],
    }


def _pair(rng: random.Random) -> dict[str, Any]:
    question, right, wrong = _question(rng)
    chosen, rejected = _assistant(right, _FORM), _assistant(wrong, _FORM)
    return {"prompt": [_user(question)], "chosen": [chosen], "rejected": [rejected]}


def _prompt(rng: random.Random) -> dict[str, Any]:
    question, right, _ = _question(rng)
    return {"question": question, "answer": right}


def _texts() -> list[dict[str, Any]]:
    """English prose that every Python has on disk: the topics of its language reference."""
    from pydoc_data.topics import topics

    return [{"text": topics[name]} for name in sorted(topics)]


def _question(rng: random.Random) -> tuple[str, str, str]:
    """The question, its answer, and another of its numbers."""
    task = largest_number(rng)
    others = [word for word in _digits(task["question"]) if word != task["answer"]]
    return task["question"], task["answer"], rng.choice(others)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(number: str, form: str) -> dict[str, str]:
    return {"role": "assistant", "content": form.format(number)}


if __name__ == "__main__":
    main()
