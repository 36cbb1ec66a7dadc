"""HF classifiers of every build as rewards: each answer gets the score that the model gives it alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHAT_TEMPLATE, byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lit_posttrain.rewards import LearnedReward, RewardError, judge
from lit_posttrain.types import Sample, Verdict

LONGEST = 40


def sample(prompt: Any, completion: str, stop: Any = "stop") -> Sample:
    return Sample(prompt, completion, [1], stop, None, {})


def pairs_tokenizer(side: str, segments: bool) -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] prompt [SEP] answer [SEP], and segments of both."""
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"})  # type: ignore
    cls, sep = (tokenizer.convert_tokens_to_ids(t) for t in ("[CLS]", "[SEP]"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="[PAD]", padding_side=side,
        model_input_names=["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"],
    )  # fmt: skip


SIZES: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


def encoder(folder: Path, kind: str, side: str = "right") -> tuple[Any, PreTrainedTokenizerFast]:
    """A small encoder with its tokenizer; ``LONGEST`` tokens are the most that it reads."""
    tokenizer = pairs_tokenizer(side, segments=kind == "bert")
    shared: dict[str, Any] = {**SIZES, "vocab_size": len(tokenizer), "num_labels": 1}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "bert":
            shared |= {"max_position_embeddings": LONGEST, "pad_token_id": tokenizer.pad_token_id}
            network: Any = BertForSequenceClassification(BertConfig(**shared))
        else:
            network = RobertaForSequenceClassification(
                # Its positions begin behind the padding's.
                RobertaConfig(max_position_embeddings=LONGEST + 2, pad_token_id=1, type_vocab_size=1, **shared)
            )
        for p in network.parameters():
            if p.dim() > 1:
                p.data.mul_(8)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network.eval(), tokenizer


def placed(folder: Path, **arguments: Any) -> LearnedReward:
    reward = LearnedReward(str(folder), compute_dtype="float32", **arguments)
    reward.place(torch.device("cpu"))
    return reward


SAMPLES = [sample("ab", "cd"), sample("ab", "cdefghijkl"), sample("another", ""), sample("x", "y z")]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_gives_what_it_gives_a_row_alone(kind: str, side: str, tmp_path: Path) -> None:
    """Segments and all, whichever side its tokenizer pads, alone or in a batch."""
    network, tokenizer = encoder(tmp_path, kind, side)
    with torch.no_grad():
        expected = [
            float(network(**tokenizer(s.prompt, s.completion, return_tensors="pt")).logits[0, 0]) for s in SAMPLES
        ]
    for budget in (1, 24, 4096):
        assert placed(tmp_path, token_budget=budget).scores(SAMPLES) == pytest.approx(expected, abs=2e-5)
    assert max(expected) - min(expected) > 1e-2


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_keeps_its_beginning_and_the_whole_answer(kind: str, tmp_path: Path) -> None:
    """A long prompt loses its first tokens; a long answer has no score, and harms nobody."""
    network, tokenizer = encoder(tmp_path, kind)
    room = LONGEST - 3 - 4
    prompt = "y" * 50 + "x" * room
    with torch.no_grad():
        expected = float(network(**tokenizer("x" * room, "ijkl", return_tensors="pt")).logits[0, 0])
    samples = [sample(prompt, "ijkl"), sample("a", "b" * (LONGEST - 3)), sample("a", "b" * 300), SAMPLES[0]]
    long, full, never, fine = placed(tmp_path).scores(samples)
    assert long == pytest.approx(expected, abs=2e-5)
    assert isinstance(fine, float)
    for verdict in (full, never):
        assert verdict == Verdict(0.0, "invalid", "too_long")


def decoder(folder: Path, tokenizer: PreTrainedTokenizerFast, padding: int | None, labels: int = 2) -> Any:
    config = GPT2Config(
        vocab_size=len(tokenizer) + 1, n_embd=16, n_layer=1, n_head=2, n_positions=128, num_labels=labels,
        pad_token_id=padding,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = GPT2ForSequenceClassification(config)
        for p in network.parameters():
            if p.dim() > 1:
                p.data.mul_(8)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network.eval()


@pytest.mark.parametrize("in_tokenizer", [True, False])
def test_a_decoder_without_a_padding_token_of_its_own(in_tokenizer: bool, tmp_path: Path) -> None:
    """HF takes only one row of such a model at a time, and reads its last token."""
    tokenizer = byte_tokenizer(None)
    if not in_tokenizer:
        tokenizer.pad_token = None
    network = decoder(tmp_path, tokenizer, None)
    samples = [s for s in SAMPLES if s.completion]
    with torch.no_grad():
        rows = [[*tokenizer(s.prompt).input_ids, *tokenizer(s.completion).input_ids, 1] for s in samples]
        expected = [float(network(input_ids=torch.tensor([row])).logits[0, 1]) for row in rows]
    assert placed(tmp_path, label=1).scores(samples) == pytest.approx(expected, abs=2e-5)


def test_a_decoder_with_several_outputs_reads_its_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    network = decoder(tmp_path, tokenizer, len(tokenizer))
    asked = [{"role": "user", "content": "Hello"}]
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi"
    with torch.no_grad():
        expected = [
            float(network(input_ids=torch.tensor([tokenizer(t, add_special_tokens=False).input_ids])).logits[0, 0])
            for t in (text + "<|im_end|>", text)
        ]
    got = placed(tmp_path, label=0).scores([sample(asked, "Hi"), sample(asked, "Hi", "length")])
    assert got == pytest.approx(expected, abs=2e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("labels", [1, 2])
def test_what_cannot_be_read_is_one_samples_alone(labels: int, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('no') if messages[0].role == 'system' }}" + CHAT_TEMPLATE)
    decoder(tmp_path, tokenizer, len(tokenizer), labels)
    reward = placed(tmp_path, label=0)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    got = judge([reward], [sample("a", "\ud800"), sample(system, "b"), sample("a", "b")])
    assert got.valid.tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"rewards\.init_args\.model: .* cannot read the prompts .*refuses"):
        reward.check_prompt(system)
    reward.check_prompt(system[1:])


@pytest.mark.parametrize("label", [-1, 1, 5])
def test_a_label_that_the_model_does_not_have(label: int, tmp_path: Path) -> None:
    encoder(tmp_path, "bert")
    with pytest.raises(ValueError, match=r"rewards\.init_args\.label: the model has 1 outputs"):
        placed(tmp_path, label=label)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """transformers would make an empty one, and read nothing of any text."""
    decoder(tmp_path, byte_tokenizer(None), 2, labels=1)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"rewards\.init_args\.model: "):
        placed(tmp_path)


def test_a_calibration_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder(tmp_path, "bert")
    reward = placed(tmp_path, calibration=2)
    monkeypatch.setattr(reward, "scores", lambda samples: [float("nan"), 3.0])
    reward.calibrate(SAMPLES[:2])
    assert reward.mean == 3.0
    monkeypatch.setattr(reward, "scores", lambda samples: [float("nan")] * 2)
    with pytest.raises(RewardError, match="no sample of the calibration has a score"):
        reward.calibrate(SAMPLES[:2])


def test_a_calibration_under_another_name_is_not_lost_unnoticed(tmp_path: Path) -> None:
    reward = LearnedReward(str(tmp_path), calibration=2, name="second")
    with pytest.raises(ValueError, match=r"init_args\.name: .* no calibration of a reward called 'second'"):
        reward.restore({})
    LearnedReward(str(tmp_path)).restore({})
    with pytest.warns(UserWarning, match=r"rewards\.init_args\.calibration: .*--ckpt_path"):
        reward.warn_uncalibrated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LearnedReward(str(tmp_path)).warn_uncalibrated()
