"""Comparisons of completions: pairs and rankings."""

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_posttrain.data.columns import has, number, where
from lit_posttrain.data.demonstrations import answers, shares
from lit_posttrain.data.examples import Dropped, ExampleData
from lit_posttrain.data.messages import EXTRAS
from lit_posttrain.data.pairs import KINDS, PROMPT_IDS, Comparison, comparison, content, tied
from lit_posttrain.data.sources import Row
from lit_posttrain.types import Example, ExampleBatch

_COLUMNS = tuple(dict.fromkeys(name for names in KINDS.values() for name in names))
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
Truncation = Literal["keep_end", "keep_start"]
Keep = Literal["all", "best_worst"]
_DEMONSTRATIONS = 512  # that a mean is taken over where none are given


class Preferences(ExampleData):
    """Comparisons: pairs, or rankings of any number of completions of a prompt.

    Rows hold ``prompt``, ``chosen`` and ``rejected``, texts or messages; only ``chosen`` and ``rejected``, which begin
    alike; ``prompt``, ``completions`` and either ``scores`` or ``ranks`` (1 is the best, equal ones tie); or
    ``chosen_ids`` and ``rejected_ids`` (or ``chosen_input_ids`` and ``rejected_input_ids``), which begin alike unless
    ``prompt_ids`` or ``prompt_input_ids`` stands beside them. ``margin`` is handed on, and so are the reference's
    log-probs of a pair, ``ref_chosen_logps`` and ``ref_rejected_logps``. Rows that prefer nothing are left out and
    counted. Equal completions of a ranking tie, and rows in which they had not are counted.

    Args:
        batch_size: Prompts per optimizer step over all ranks.
        keep: ``all`` completions of a ranking, or only the best and the worst.
        max_prompt_length: Longer prompts are cut to so many tokens.
        prompt_truncation: Which side of a long prompt is kept; BOS always is.
        truncate_responses: Cut completions that do not fit into ``max_length`` instead of leaving their row out. All
            completions of the row then lose their end token, so that length and ending tell them not apart.
        demonstrations: A dataset of ``prompt`` and ``completion``, or ``messages``, on which a reward model's mean
            score is made 0; null takes the best completions of the first training prompts.
        reference_samples: Likewise, completions sampled from the reference, on which the scores' variance is made 1.
        **kwargs: As of :class:`~lit_posttrain.data.examples.ExampleData`.
    """

    known = (*_COLUMNS, *PROMPT_IDS, "margin", *_REFERENCE, *EXTRAS)

    def __init__(
        self,
        *,
        keep: Keep = "all",
        max_prompt_length: int | None = None,
        prompt_truncation: Truncation = "keep_end",
        truncate_responses: bool = False,
        demonstrations: str | None = None,
        reference_samples: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if max_prompt_length is not None and not 1 <= max_prompt_length < (self.max_length or max_prompt_length + 1):
            raise ValueError(
                f"data.init_args.max_prompt_length: must be at least 1 and below max_length, is {max_prompt_length}"
            )
        if truncate_responses and self.max_length is None:
            raise ValueError("data.init_args.truncate_responses: needs max_length")
        self.keep: Keep = keep
        self.max_prompt_length, self.prompt_truncation = max_prompt_length, prompt_truncation
        self.truncate_responses = truncate_responses
        self._calibration = {"demonstrations": demonstrations, "reference_samples": reference_samples}
        self._answers: dict[str, list[Example]] = {}

    def setup(self, stage: str | None = None) -> None:
        """As the base class does; also what scores are normalised on."""
        first = not self._examples
        super().setup(stage)
        if not first:
            return
        for name, path in self._calibration.items():
            if path is not None:
                self._answers[name] = answers(path, name, self.encoder, self.max_length)
        cut = sum(counts["truncated_responses"] for counts in self._counts.values())
        if cut:
            rank_zero_warn(
                f"data.init_args.truncate_responses: {cut} rows were cut to {self.max_length} tokens, and none of "
                "their completions has an end token: a policy trained on many of them does not learn to stop"
            )

    def content(self, row: Row) -> str:
        """The prompt, also where it is implicit."""
        return content(row)

    def encode(self, row: Row) -> Iterable[Example | Dropped]:
        """The comparison, unless nothing in it is preferred or it is too long."""
        compared = comparison(row, self.encoder)
        if len(compared.completions) == 1:
            return [Dropped("single_completion")]
        if len(set(compared.preference)) == 1:
            return [Dropped("all_tied")]
        if self.keep == "best_worst":
            compared = _best_and_worst(compared)
        fitting = self._fit(compared)
        if fitting is None:
            return [Dropped("long_examples")]
        if len(set(map(tuple, fitting.completions))) == 1:
            return [Dropped("identical_completions")]
        prompt, completions, masks, given, messages = fitting
        preference = tied(completions, given)
        if preference != given:
            self.count("contradictory_completions")
        if len(set(preference)) == 1:
            return [Dropped("all_tied")]
        columns: dict[str, Any] = {"preference": preference}
        if has(row, "margin"):
            columns["margin"] = [number(row["margin"], where(row, "margin"))] * len(completions)
        if any(has(row, name) for name in _REFERENCE):
            if len(completions) != 2 or not has(row, *_REFERENCE):
                raise ValueError(f"{row.origin}: {' and '.join(_REFERENCE)} come together, for a pair")
            if (prompt, completions) != (compared.prompt, compared.completions):
                raise ValueError(
                    f"{row.origin}: {' and '.join(_REFERENCE)} are of the whole pair, and data.init_args.max_length or "
                    "max_prompt_length cuts it; raise them, or leave these columns out"
                )
            of_pair = [number(row[name], where(row, name)) for name in _REFERENCE]
            columns["ref_log_probs"] = of_pair if preference[0] > preference[1] else of_pair[::-1]
        return [Example(prompt, completions, masks, columns, row.origin, messages)]

    def _fit(self, compared: Comparison) -> Comparison | None:
        prompt, completions, masks, preference, messages = compared
        limit = self.max_prompt_length
        if limit is not None and len(prompt) > limit:
            self.count("truncated_prompts")
            prompt = self._cut(prompt, limit)
        room = None if self.max_length is None else self.max_length - len(prompt)
        if room is not None and max(map(len, completions)) > room:
            if not self.truncate_responses or room < 1:
                return None
            lengths = [min(len(c) - self.encoder.ends(c[-1]), room) for c in completions]
            completions = [c[:n] for c, n in zip(completions, lengths, strict=True)]
            masks = [m[:n] for m, n in zip(masks, lengths, strict=True)]
            if not all(map(any, masks)):
                return None
            self.count("truncated_responses")
        return Comparison(prompt, completions, masks, preference, messages)

    def _cut(self, prompt: list[int], limit: int) -> list[int]:
        if self.prompt_truncation == "keep_start":
            return prompt[:limit]
        leading = self.encoder.leading
        kept = leading if leading and prompt[: len(leading)] == leading and len(leading) < limit else []
        return kept + prompt[len(prompt) - limit + len(kept) :]

    def demonstrations(self) -> list[ExampleBatch]:
        """This rank's share of what a reward model's mean score is made 0 on; as many batches on every rank."""
        return shares(self._answers.get("demonstrations") or self._best(), self.val_batch_size, *self._ranks())

    def reference_samples(self) -> list[ExampleBatch]:
        """This rank's share of the reference's samples; as many batches on every rank.

        Raises:
            ValueError: There are none.
        """
        if "reference_samples" not in self._answers:
            raise ValueError("data.init_args.reference_samples: not set, and model.init_args.unit_variance needs them")
        return shares(self._answers["reference_samples"], self.val_batch_size, *self._ranks())

    def _best(self) -> list[Example]:
        best = []
        for e in self._examples["train"][:_DEMONSTRATIONS]:
            scores = e.columns["preference"]
            i = scores.index(max(scores))  # pyright: ignore[reportCallIssue, reportArgumentType]
            best.append(Example(e.prompt, [e.completions[i]], [e.masks[i]], {}, e.origin, e.messages))
        return best


def _best_and_worst(compared: Comparison) -> Comparison:
    scores = compared.preference
    both = [scores.index(max(scores)), scores.index(min(scores))]
    completions, masks = [compared.completions[i] for i in both], [compared.masks[i] for i in both]
    return Comparison(compared.prompt, completions, masks, [scores[i] for i in both], compared.messages)
