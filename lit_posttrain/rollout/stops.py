"""When a completion ends: by a stop token, or by a stop string in its decoded tail."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_TAIL_SLACK = 8
# Some tokenizers ask for " ." to be written as ".", and then a stop string with that space would never be seen.
EXACT_TEXT = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


class StopRule:
    """Whether the tokens so far end a completion.

    Args:
        token_ids: Ids that end it.
        strings: Texts that end it.
        tokenizer: Needed where there are strings.
    """

    def __init__(self, token_ids: Sequence[int], strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None):
        assert tokenizer is not None or not strings, "stop strings need a tokenizer"
        self.token_ids = frozenset(token_ids)
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A token holds at least one byte of text, so this many tokens contain every string that the last one closes.
        self.tail = max((len(s.encode()) for s in strings), default=0) + _TAIL_SLACK

    def stopped(self, tokens: Sequence[int]) -> bool:
        """True where the last token ends the completion."""
        if tokens[-1] in self.token_ids:
            return True
        if not self.strings:
            return False
        assert self.tokenizer is not None
        text = str(self.tokenizer.decode(list(tokens[-self.tail :]), **EXACT_TEXT))
        return any(s in text for s in self.strings)
