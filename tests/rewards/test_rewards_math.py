"""Mathematical answers: accuracy on a corpus, no reward for hacks, verdict rules."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lit_posttrain.rewards import MathVerifier, judge
from lit_posttrain.rewards.compare import Question, compare
from lit_posttrain.types import Sample

pytest.importorskip("math_verify")

CASES = [json.loads(line) for line in Path(__file__).with_name("math_cases.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(timeout=8.0)
    yield verifier
    verifier.close()


def sample(case):
    return Sample("p", case["completion"], [1], case.get("stop_reason", "stop"), case["gold"], {})


def of(gold, answer):
    return Sample("p", f"\\boxed{{{answer}}}", [1], "stop", gold, {})


@pytest.mark.trap(38)
def test_corpus(verifier):
    cases = [case for case in CASES if case["category"] != "hostile"]
    assert len(cases) >= 120
    found = judge([verifier], [sample(case) for case in cases])
    assert found.valid.all()
    wrong = [
        (c["gold"], c["completion"], r)
        for c, r in zip(cases, found.rewards.tolist(), strict=True)
        if r != c["expected"]
    ]
    assert wrong == []
    counts = Counter(case["expected"] for case in cases)
    assert min(counts.values()) >= 100  # both kinds, so that neither "always" nor "never" passes


def test_hostile_answers_earn_nothing():
    verifier = MathVerifier(timeout=0.2, workers=2)
    cases = [case for case in CASES if case["category"] == "hostile"]
    try:
        verdicts = verifier([sample(case) for case in cases])
    finally:
        verifier.close()
    assert [v.score for v in verdicts] == [0.0] * len(cases)
    # On a crowded machine a worker may be denied its time; that is never called the answer's fault, nor rewarded.
    assert {v.reason for v in verdicts if v.status != "scored"} <= {"worker_starved"}
    assert any(v.reason in ("timeout", "worker_starved") for v in verdicts)


def test_integers_need_no_worker(verifier):
    alone = MathVerifier()
    alone.pool.run = None  # calling it would raise
    assert alone._by_text(of("25", "025")) == (1.0, "scored", "")
    for gold, answer in [("25", "26"), ("25", "25.5"), ("25", "x"), ("3", "3=4"), ("5", "x=5"), ("1/2", "0.5")]:
        assert not isinstance(compare(gold, answer), Question)


def test_each_question_is_asked_once(verifier):
    asked = []
    original = verifier.pool.run
    verifier.pool.run = lambda jobs: asked.append(list(jobs)) or original(jobs)
    try:
        verdicts = verifier([of("\\frac{1}{2}", "2^{-1}")] * 8 + [of("\\frac{1}{2}", "3^{-1}")] * 8)
    finally:
        verifier.pool.run = original
    assert [len(jobs) for jobs in asked] == [2]
    assert [v.score for v in verdicts] == [1.0] * 8 + [0.0] * 8


@pytest.mark.parametrize(
    "gold", ["5", "1,234", "\\frac{1}{2}", "x^2+1", "(3,\\infty)", "\\text{Tuesday}", "C", "1011_2", "$5$"]
)
def test_usable_gold(verifier, gold):
    verifier.check_answer(gold)


@pytest.mark.trap(19)
@pytest.mark.parametrize("gold", [None, "", " ", "$$", "\\frac{1}{", "\\begin{pmatrix}1"])
def test_unusable_gold(verifier, gold):
    with pytest.raises(ValueError, match="gold answer"):
        verifier.check_answer(gold)


def test_gold_that_slipped_through_is_invalid_not_zero(verifier):
    found = judge([verifier], [of("\\frac{1}{", "2^2")])
    assert found.valid.tolist() == [False]
    assert verifier([of(None, "5")])[0].status == "not_applicable"


@pytest.mark.parametrize(
    ("answer", "vote"),
    [("025", "25"), ("1,234", "1234"), ("0.50", "1/2"), ("\\dfrac{1}{2}", "1/2"), ("x + 1", "x+1"), ("", None)],
)
def test_votes(verifier, answer, vote):
    assert verifier.extract(of("0", answer)) == vote


@pytest.mark.skipif(sys.platform != "linux", reason="process control of Linux")
def test_judge_retries_what_a_lost_worker_took_down(verifier):
    original, lost = verifier.pool._start_job, []

    def start_and_kill_once(job):
        worker = original(job)
        if not lost:
            lost.append(worker.pid)
            os.kill(worker.pid, signal.SIGSTOP)  # before it can answer
            os.kill(worker.pid, signal.SIGKILL)
        return worker

    verifier.pool._start_job = start_and_kill_once
    try:
        job = of("\\frac{1}{2}", "\\left(\\sqrt{2}\\right)^{-2}")
        alone = verifier([job])
        lost.clear()
        found = judge([verifier], [job])
    finally:
        verifier.pool._start_job = original
    assert alone[0].status in ("invalid", "scored")
    assert alone[0].score in (0.0, 1.0)
    assert found.valid.tolist() == [True]
    assert found.rewards.tolist() == [1.0]


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lit-posttrain\[tasks\]'"):
        MathVerifier()


def test_importing_rewards_imports_no_task_library():
    code = "import sys, lit_posttrain.rewards; assert not {'math_verify', 'reasoning_gym'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
