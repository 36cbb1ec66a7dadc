"""reasoning-gym's scorers behind extraction, a threshold, and a process boundary."""

import inspect
import re

import pytest

from lit_posttrain.data.gym_names import EXECUTING_SCORERS, refuse_executing
from lit_posttrain.rewards import ReasoningGymReward, judge
from lit_posttrain.types import Sample

reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def reward():
    reward = ReasoningGymReward()
    yield reward
    reward.close()


def sample(item, completion, stop="stop"):
    return Sample(item["question"], completion, [1], stop, item["answer"], dict(item))


@pytest.mark.parametrize(
    "name", ["basic_arithmetic", "spell_backward", "sudoku", "prime_factorization", "leg_counting"]
)
def test_oracle_answers_are_right_and_garbage_is_not(reward, name):
    item = reasoning_gym.create_dataset(name, seed=3, size=1)[0]
    found = judge([reward], [sample(item, text) for text in (
        f"<think>hm</think> <answer>{item['answer']}</answer>",
        f"<answer>{item['answer']}</answer>",
        "<answer>qwertz 17 +</answer>",
        f"<answer>{item['answer']} or something else entirely</answer>",
        f"{item['answer']}",
        "",
    )])  # fmt: skip
    assert found.valid.all()
    assert found.rewards.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_scorer_that_raises_on_the_answer_gives_zero_with_the_reason(reward):
    item = reasoning_gym.create_dataset("prime_factorization", seed=3, size=1)[0]
    assert reward([sample(item, "<answer>two times x</answer>")])[0] == (0.0, "scored", "scorer_raised:ValueError")


def test_partial_credit_needs_a_lower_threshold(reward):
    item = reasoning_gym.create_dataset("basic_arithmetic", seed=3, size=1)[0]
    half = [sample(item, f"<answer>{item['answer']}!</answer>")]
    assert reward(half)[0].score == 0.0
    lenient = ReasoningGymReward(threshold=0.01)
    try:
        assert lenient(half)[0].score == 1.0
    finally:
        lenient.close()


def test_truncated_and_foreign_rows(reward):
    item = reasoning_gym.create_dataset("basic_arithmetic", seed=3, size=1)[0]
    assert reward([sample(item, f"<answer>{item['answer']}</answer>", "length")])[0] == (0.0, "scored", "truncated")
    assert reward([Sample("p", "\\boxed{1}", [1], "stop", "1", {})])[0].status == "not_applicable"


@pytest.mark.parametrize("name", sorted(EXECUTING_SCORERS))
def test_scorers_that_execute_are_refused(reward, tmp_path, name):
    target = tmp_path / "written"
    with pytest.raises(ValueError, match="executes the text"):
        refuse_executing(name)
    with pytest.raises(ValueError, match="executes the text"):
        reward.check_source(name)
    row = Sample("p", f"<answer>open({str(target)!r}, 'w')</answer>", [1], "stop", "1",
                 {"question": "q", "metadata": {"source_dataset": name}})  # fmt: skip
    assert reward([row])[0].status == "invalid"
    assert not target.exists()


def test_no_other_scorer_evaluates_its_argument():
    """Guards against new releases: a scorer that mentions eval, exec or a parser of expressions must be listed."""
    from reasoning_gym.factory import DATASETS

    suspects = set()
    for name, (cls, _) in DATASETS.items():
        source = inspect.getsource(cls.score_answer)
        if re.search(r"\b(?:eval|exec|sympify|parse_expr|compile|pickle|S)\(\s*(?:user_)?(?:answer|\w*answer)", source):
            suspects.add(name)
    helpers = {"n_queens"}  # evaluates a cleaned copy
    assert suspects | helpers <= EXECUTING_SCORERS
    assert set(DATASETS) >= EXECUTING_SCORERS


def test_unknown_generator(reward):
    reward.check_source("basic_arithmetic")
    with pytest.raises(ValueError, match="no reasoning-gym task"):
        reward.check_source("nope")


def test_arguments(monkeypatch):
    with pytest.raises(ValueError, match="threshold"):
        ReasoningGymReward(threshold=0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lit-posttrain\[tasks\]'"):
        ReasoningGymReward()
