import random
from typing import Any

import jsonargparse
import pytest

from lit_posttrain.data.arithmetic import addition, largest_number
from lit_posttrain.data.gym_names import EXECUTING_SCORERS
from lit_posttrain.data.tasks import PythonTask, ReasoningGym, Task, distinct_examples

reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(
    "make", [lambda seed: PythonTask(largest_number, seed), lambda seed: ReasoningGym("chain_sum", seed)]
)
def test_an_example_is_a_function_of_seed_and_index(make: Any) -> None:
    indices = [*range(20), 999, 1000, 2500]
    there = [make(3).example(i)["question"] for i in indices]
    task = make(3)
    random.seed(0)
    back = [task.example(i)["question"] for i in reversed(indices)]
    assert there == back[::-1]


@pytest.mark.parametrize(
    "make", [lambda seed: PythonTask(largest_number, seed), lambda seed: ReasoningGym("chain_sum", seed)]
)
def test_neighbouring_seeds_and_blocks_share_nothing(make: Any) -> None:
    first, second = ({make(seed).example(i)["question"] for i in range(200)} for seed in (42, 43))
    assert not first & second
    task = make(42)
    assert not first & {task.example(i)["question"] for i in range(1000, 1200)}


def test_reasoning_gyms_own_neighbouring_seeds_overlap() -> None:
    """The trap that makes the keys necessary; if this fails they could go."""
    first, second = (
        {item["question"] for item in reasoning_gym.create_dataset("chain_sum", seed=seed, size=100)}
        for seed in (42, 43)
    )
    assert len(first & second) == 99


def test_a_gym_row_can_be_scored_by_its_generator() -> None:
    row = ReasoningGym("graph_color", config={"min_num_vertices": 4, "max_num_vertices": 4}).example(5)
    assert row["answer"] is None
    dataset = reasoning_gym.create_dataset("graph_color")
    colors = row["metadata"]["possible_answer"]
    assert dataset.score_answer(str(colors).replace("'", '"'), row) in (0.0, 1.0)
    row = ReasoningGym("chain_sum").example(5)
    assert set(row) == {"question", "answer", "metadata"}
    assert row["metadata"]["source_dataset"] == "chain_sum"
    assert reasoning_gym.create_dataset("chain_sum").score_answer(row["answer"], row) == 1.0


@pytest.mark.parametrize("name", sorted(EXECUTING_SCORERS))
def test_generators_that_execute_answers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is refused: its scorer executes"):
        ReasoningGym(name)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chainsum", {}, r"init_args.name: reasoning-gym has no 'chainsum' \(did you mean 'chain_sum'\?\)"),
        ("chain_sum", {"min_term": 2}, r"config.min_term: .* \(did you mean 'min_terms'\?\); it has min_terms"),
        ("chain_sum", {"min_terms": -1}, r"init_args.config: chain_sum refuses \{'min_terms': -1\}: min_terms must be"),
        ("chain_sum", {"min_terms": "two"}, r"init_args.config: chain_sum refuses"),
    ],
)
def test_gym_mistakes_are_named(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGym(name, config=config).example(0)


@pytest.mark.parametrize("option", ["seed", "size"])
def test_the_gyms_own_seed_and_size_are_not_options(option: str) -> None:
    with pytest.raises(ValueError, match=f"config.{option}: remove it"):
        ReasoningGym("chain_sum", config={option: 1})


def test_errors_of_a_users_function_name_it() -> None:
    with pytest.raises(ValueError, match=r"arithmetic.addition\(rng, \*\*\{'digit': 2\}\) raised TypeError at index 4"):
        PythonTask(addition, arguments={"digit": 2}).example(4)
    with pytest.raises(ValueError, match=r"addition\(rng, .* raised ValueError at index 0: cannot draw"):
        PythonTask(addition, arguments={"digits": 1, "terms": 20}).example(0)
    with pytest.raises(ValueError, match=r"_no_dict.* returned str, not a dict"):
        PythonTask(_no_dict).example(0)


def _no_dict(rng: random.Random) -> Any:
    return "question"


def _only_question(rng: random.Random) -> dict[str, Any]:
    return {"question": "q"}


def _from_elsewhere(rng: random.Random) -> dict[str, Any]:
    return {"question": str(random.random()), "answer": "1"}


def _coin(rng: random.Random) -> dict[str, Any]:
    return {"question": f"Which side is {rng.choice('ab')}?", "answer": "1"}


def test_distinct_examples_fill_both_sets() -> None:
    rows = distinct_examples(PythonTask(addition, arguments={"digits": 1}), 40, 5, 10)
    # 9 x 8 ordered pairs of different digits: duplicates are drawn, kept and left for others to count.
    assert len({row["question"] for row in rows}) == 45
    assert len(rows) > 45
    assert rows == distinct_examples(PythonTask(addition, arguments={"digits": 1}), 40, 5, 10)
    assert [row.number for row in rows] == sorted({row.number for row in rows})
    assert rows[0].origin == "PythonTask.example(0)"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_only_question, r"PythonTask.example\(0\) must have question \(text\) and answer"),
        (_from_elsewhere, r"example\(0\) differs from call to call"),
        (_coin, r"hold only 2 different training questions of 40 and 0 held-out ones of 5; lower .*train_size"),
    ],
)
def test_tasks_that_cannot_fill_the_sets(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distinct_examples(PythonTask(function), 40, 5, 10)


def test_tasks_are_named_by_class_path() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task | None)
    yaml = (
        "{class_path: lit_posttrain.data.PythonTask, init_args: "
        "{function: lit_posttrain.data.arithmetic.largest_number, seed: 3, arguments: {count: 2}}}"
    )
    task = parser.instantiate(parser.parse_args([f"--task={yaml}"])).task
    assert task.example(8) == PythonTask(largest_number, 3, {"count": 2}).example(8)
