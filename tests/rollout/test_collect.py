"""What stands between the engine and the rewards: keys, text, rows."""

from typing import Any

import torch
from tiny import byte_tokenizer

from lit_posttrain.rewards.base import PerSampleReward, judge
from lit_posttrain.rollout import RolloutEngine, SamplingParams
from lit_posttrain.rollout.collect import assemble, generate, to_samples
from lit_posttrain.types import Completion, Prompt, Sample

TOKENIZER = byte_tokenizer()
STOP = TOKENIZER.eos_token_id


def prompt(number: int, text: str = "Say it.", prefill: str = "") -> Prompt:
    return Prompt(number, text, text, TOKENIZER.encode(text + prefill), prefill, "yes", {"source": "here"})


def completion(text: str, *, ended: bool = True) -> Completion:
    ids = TOKENIZER.encode(text) + ([STOP] if ended else [])
    return Completion(ids, [-0.5 - 0.1 * i for i in range(len(ids))], "stop" if ended else "length", 1)


class Recording(RolloutEngine):
    """An engine that only notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any]] = []

    def sync(self, policy: Any) -> None: ...

    def bind(self, tokenizer: Any) -> None: ...

    def generate(self, prompts: Any, sampling: Any, keys: Any, tick: Any = None) -> list[Completion]:
        self.asked += list(zip(prompts, keys, strict=True))
        return [completion("x") for _ in prompts]


class Length(PerSampleReward):
    def score(self, sample: Sample) -> float:
        return float(len(sample.completion))


def test_samples_of_a_prompt_stand_together_and_no_two_draws_share_a_key() -> None:
    engine = Recording()
    sampling = SamplingParams(max_new_tokens=4)
    for iteration in range(2):
        for purpose in ("rollout", "evaluate"):
            generate(engine, [prompt(7), prompt(3)], 3, sampling, 1, purpose, iteration, print)
    assert [key.prompt_id for _, key in engine.asked[:6]] == [7, 7, 7, 3, 3, 3]
    assert len({key for _, key in engine.asked}) == len(engine.asked) == 24
    assert all(list(ids) == TOKENIZER.encode("Say it.") for ids, _ in engine.asked)


def test_rewards_see_the_prefill_in_front_and_no_final_stop_token() -> None:
    drawn = [completion(" hm</think>"), completion("cut", ended=False)]
    first, second = to_samples(TOKENIZER, [prompt(1, prefill="<think>")], drawn, [STOP])
    assert first.completion == "<think> hm</think>"
    assert second.completion == "<think>cut"
    assert (first.stop_reason, second.stop_reason) == ("stop", "length")
    assert first.token_ids == drawn[0].token_ids
    assert first.answer == "yes"
    assert first.columns == {"source": "here"}


def test_a_stop_token_within_the_text_and_a_stop_string_stay_visible() -> None:
    inner = Completion([*TOKENIZER.encode("a"), STOP, *TOKENIZER.encode("b"), STOP], [0.0] * 4, "stop", 1)
    by_string = completion("done.", ended=False)._replace(stop_reason="stop")
    shown = [s.completion for s in to_samples(TOKENIZER, [prompt(1)], [inner, by_string], [STOP])]
    assert shown == ["a<|im_end|>b", "done."]


def test_log_probs_and_masks_stand_where_the_tokens_are() -> None:
    prompts, drawn = [prompt(1, "ab"), prompt(2, "abcd")], [completion("xy"), completion("z", ended=False)]
    samples = to_samples(TOKENIZER, prompts, drawn, [STOP])
    rollout = assemble(prompts, [5, 6], drawn, samples, judge([Length()], samples))
    assert rollout.rows == [5, 6]
    for row in range(2):
        ids, start = drawn[row].token_ids, len(prompts[row].token_ids)
        # Position i scores token i + 1.
        where = torch.arange(start - 1, start - 1 + len(ids))
        assert rollout.sequences.ids[row, where + 1].tolist() == ids
        assert torch.allclose(rollout.engine_log_probs[row, where], torch.tensor(drawn[row].log_probs))
        assert rollout.mask[row].nonzero()[:, 0].tolist() == where.tolist()
        assert rollout.engine_log_probs[row][~rollout.mask[row]].abs().sum() == 0
