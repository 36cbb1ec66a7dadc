"""PPO-ptx's pretraining loss: a second stream of text beside every update of an online algorithm."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from lit_posttrain.batching import split
from lit_posttrain.data.examples import ExampleData
from lit_posttrain.functional.masked import Totals, aggregate
from lit_posttrain.sharding import all_reduce_sum, rank, world_size
from lit_posttrain.types import ExampleBatch, Loss, MicroBatch, Stream

KEY = "model.init_args.ptx"


@final
@dataclass(frozen=True, kw_only=True)
class PtxConfig:
    """coef E_{x ~ pretraining}[log pi(x)] in what is maximised (InstructGPT, 2203.02155 Eq. 2).

    The paper does not say in what unit its log pi(x) is; here it is the mean over tokens. Both terms' gradient norms
    are logged (``grad_norm/rl``, ``grad_norm/ptx``): choose ``coef`` by them.

    Args:
        coef: Weight of the mean cross-entropy a token, >= 0; 27.8 in the paper. 0 reads no text.
        ratio: Pretraining examples for each answer, in every epoch of updates; 8 in the paper.
        data: The text: usually ``SupervisedExamples`` with rows of ``text``, ``supervise: all``,
            ``long_examples: split`` and no held-out share. Its ``batch_size`` must be ``ratio`` times the answers of an
            iteration.
    """

    coef: float
    ratio: float
    data: ExampleData

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range.
        """
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"{KEY}.coef: must be finite and at least 0, got {self.coef}")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"{KEY}.ratio: must be finite and above 0, got {self.ratio}")


class Pretraining:
    """Serves each update its share of the text.

    Epoch *e* of iteration *i* reads batch ``i * num_epochs + e`` and divides it among the minibatches, so its position
    follows from the iteration.

    Args:
        config: What to read, and its weight.
    """

    def __init__(self, config: PtxConfig):
        self.config, self.data = config, config.data
        self._kept: tuple[int, ExampleBatch] | None = None

    def setup(self, module: Any, answers: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the text, with the policy's tokenizer.

        Args:
            module: The algorithm.
            answers: Of an iteration, over all ranks.
            tokenizer: The policy's.

        Raises:
            ValueError: The batch size does not fit the ratio, or something in the data.
        """
        wanted = self.config.ratio * answers
        if not math.isclose(self.data.batch_size, wanted):
            raise ValueError(
                f"{KEY}.data.init_args.batch_size: {self.data.batch_size} is not ratio x answers of an iteration = "
                f"{self.config.ratio:g} x {answers} = {wanted:g}"
            )
        if self.data.batch_size % (module.num_minibatches * world_size()):
            raise ValueError(
                f"{KEY}.data.init_args.batch_size: {self.data.batch_size} is not divisible by num_minibatches "
                f"{module.num_minibatches} x {world_size()} ranks"
            )
        if self.data.tokenizer is not None:
            raise ValueError(f"{KEY}.data.init_args.tokenizer: it is the policy's; leave it out")
        self.data.trainer = module.trainer
        self.data.load_tokenizer = lambda: tokenizer
        with _keys_named_from_the_root():
            self.data.setup("fit")
        for example in self.data.examples("train"):
            if len(example.completions) > 1 or example.columns:
                raise ValueError(
                    f"{KEY}.data: {type(self.data).__name__} compares or judges completions ({example.origin}), and "
                    "the policy would learn bad ones like good ones; use SupervisedExamples"
                )

    def check_fits(self, context_length: int) -> None:
        """See that every example fits into the model.

        Raises:
            ValueError: One does not; names the longest.
        """
        with _keys_named_from_the_root():
            self.data.check_fits(context_length)

    def stream(self, module: Any, iteration: int, epoch: int, minibatch: int) -> Stream:
        """The text of one update. Collective."""
        number = iteration * module.num_epochs + epoch
        if self._kept is None or self._kept[0] != number:
            self._kept = number, self.data.batch(number)
        batch = self._kept[1]
        own = len(batch.sequences.ids)
        # By position in the whole batch, so that a minibatch holds the same examples whatever the number of ranks.
        rows = [i for i in range(own) if (rank() * own + i) % module.num_minibatches == minibatch]
        tokens = all_reduce_sum([int(batch.mask[rows].sum())], module.device)[0]
        packed = module.built_policy().packs(batch.sequences.ids.shape[1])
        chosen = batch.columns["row"].new_tensor(rows)
        batches = split(batch.sequences, batch.mask, {}, module.token_budget, chosen, packed=packed)

        def loss(micro_batch: MicroBatch, totals: Totals) -> Loss:
            scored = module.built_policy()(micro_batch.sequences, micro_batch.mask, 1.0)
            entropy = aggregate(-scored.log_probs, micro_batch.mask, "token_mean", totals)
            return Loss(self.config.coef * entropy, {"loss/ptx": entropy.detach()}, {})

        return Stream("ptx", batches, Totals(self.data.batch_size / module.num_minibatches, tokens), loss, {})

    def state(self, module: Any) -> dict[str, Any]:
        """What a resume has to find again, and where a stream of rows stands."""
        number = module.trainer.global_step * module.num_epochs
        return {"text": self.data.fingerprint(), "stream": self.data.stream_state(number)}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: The text is another one.
        """
        if state is None or state["text"] != self.data.fingerprint():
            raise ValueError(
                f"{KEY}.data: the text is not what the checkpoint was trained with, so it cannot be resumed exactly; "
                "restore the setting, or start a new run from exported weights"
            )
        if state["stream"] is not None:
            self.data.load_stream(state["stream"])


@contextmanager
def _keys_named_from_the_root() -> Iterator[None]:
    """The data's errors name keys under ``data``; here it stands deeper."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("data.init_args", f"{KEY}.data.init_args")) from error
