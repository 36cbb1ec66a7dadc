"""A reward model as a HF sequence classifier that other tools read as it was trained."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

CODE_FILE = "modeling_score.py"
_CODE = '''"""The architecture's sequence classifier with a bias in its head, which normalises the scores."""

from torch import nn
from transformers import {base}


class ScoreModel({base}):
    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(self.score.in_features, 1, bias=True)
        self.post_init()
'''


def write_classifier(network: Any, out: Path) -> None:
    """Write weights, configuration and the code of the biased head; ``gain`` and ``shift`` go into the head.

    Where the bias is 0 plain ``AutoModelForSequenceClassification`` computes the same; else it takes
    ``trust_remote_code=True``, and without it every score is off by the same constant (transformers then reports
    ``score.bias`` as unexpected).
    """
    merged: Any = copy.deepcopy(network.model).float()
    if network.config.lora is not None:
        merged = merged.merge_and_unload()
    head = merged.score
    head = getattr(head, "modules_to_save", {}).get("default", head) if not isinstance(head, nn.Linear) else head
    with torch.no_grad():
        head.weight.mul_(network.gain)
        head.bias.mul_(network.gain).sub_(network.shift)
    merged.score = head
    base = type(merged).__name__
    merged.save_pretrained(out)
    (out / CODE_FILE).write_text(_CODE.format(base=base), encoding="utf-8")
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    module = CODE_FILE.removesuffix(".py")
    config["auto_map"] = {"AutoModelForSequenceClassification": f"{module}.ScoreModel"}
    config["architectures"] = [base]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the tokenizer so that other tools end a text where training did, and read the score there.

    HF's classifiers read the last token that is not padding: with ``pad == eos``, as in many chat models, that would
    be the token before the end. A chat template's line break after the last turn was not trained on either.
    """
    own = copy.deepcopy(tokenizer)
    own.pad_token = padding_token(own)
    if isinstance(own.chat_template, str):
        own.chat_template = (
            "{%- set conversation -%}" + own.chat_template + "{%- endset -%}"
            "{{- conversation if add_generation_prompt else conversation.rstrip() -}}"
        )
    own.padding_side = "right"
    own.save_pretrained(out)
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["pad_token_id"] = own.pad_token_id
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token that ends no text.

    Raises:
        ValueError: The tokenizer has none besides its end token.
    """
    taken = {str(tokenizer.eos_token)}
    candidates = [tokenizer.pad_token, tokenizer.unk_token, *_added(tokenizer), tokenizer.bos_token]
    for token in candidates:
        if token is not None and str(token) not in taken:
            return str(token)
    raise ValueError(
        "the tokenizer has no special token besides its end token, and HF's classifiers need another one for padding; "
        "add one (tokenizer.add_special_tokens({'pad_token': ...})) to the model folder before training"
    )


def _added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that are neither end nor beginning."""
    roles = {str(tokenizer.eos_token), str(tokenizer.bos_token)}
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content not in roles]
