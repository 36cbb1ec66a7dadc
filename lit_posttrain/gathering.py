"""Gradients of the vocabulary's matrices, added to those there are as backward finds them.

Of every micro-batch autograd would make a matrix for the embeddings, zeros but for the few tokens it read, another for
the head, and add up both: on a CPU the largest arrays of a backward pass, and twice the traffic of all other sums.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lit_posttrain.functional.log_probs import GATHERED_IN
from lit_posttrain.policy import Policy, causal_lm
from lit_posttrain.sharding import make_gradients


@contextmanager
def gathering(networks: Sequence[Policy], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, every parameter has a gradient, and ``backward`` adds to it; ``torch.autograd.grad`` is not for here.

    Networks that are sharded, or not on a CPU, have their gradients added up by autograd as ever.

    Args:
        networks: That backward goes through.
        parameters: What is trained. Others of the networks may have gradients too.
    """
    make_gradients(parameters)  # side by side, not between the temporaries of the first backward
    with ExitStack() as stack:
        for network in networks:
            if network.gathers:
                stack.enter_context(_in_place(network))
        yield


@contextmanager
def _in_place(network: Policy) -> Iterator[None]:
    assert network.view is not None
    lm = causal_lm(network.view.module)
    embedding: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    before, embedding.sparse = embedding.sparse, True
    if head is not None:
        setattr(head.weight, GATHERED_IN, network.view.master(head.weight))
    try:
        yield
    finally:
        embedding.sparse = before
        if head is not None:
            delattr(head.weight, GATHERED_IN)
