"""Training in packed rows on every architecture: the same as in padded rows, or a warning and padded rows."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from architectures.zoo import ARCHITECTURES, WINDOW

from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.types import Sequences

# Their attention asks for what packed rows do not know (a soft cap on scores).
PADDED = {"gemma2"}


def loaded(folder: Path) -> tuple[Policy, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = Policy(PolicyConfig(model=str(folder), compute_dtype="float32"))
    return policy, [str(w.message) for w in caught if "packed rows" in str(w.message)]


def groups(longest: int) -> Sequences:
    """Two prompts with four and two completions, one more alone; sequences of at most ``longest`` tokens."""
    prompts = [[5, 6, 7]] * 4 + [[8, 9]] * 2 + [[10]]
    generator = torch.Generator().manual_seed(0)
    lengths = [longest - 3, 1, longest - 4, 2, longest - 2, 1, longest - 1]
    return pad_sequences(prompts, [torch.randint(0, 258, (n,), generator=generator).tolist() for n in lengths])


def test_the_readme_says_which_are_native_and_which_packed() -> None:
    """Rows ``| `model_type` | yes | yes |``; what runs and what is written must be the same list."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    written = {
        m[1]: (m[2].strip(), m[3].strip()) for m in re.finditer(r"^\| `(\w+)` \| (yes|no) \|([^|]*)\|$", readme, re.M)
    }
    windowed = {name for name, config in ARCHITECTURES.items() if "sliding_window" in config}
    for name in ARCHITECTURES:
        packed = "padded" if name in PADDED else "up to the window" if name in windowed else "yes"
        assert written.pop(name) == ("yes", packed), name
    assert not written


def trained(policy: Policy, sequences: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.zero_grad()
    mask = sequences.completion_mask()
    log_probs = policy(sequences, mask, 0.8).log_probs
    (log_probs * torch.arange(mask.numel()).view(mask.shape).sin()).sum().backward()
    return log_probs.detach(), {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("longest", [WINDOW, 3 * WINDOW])
def test_packed_rows_train_as_padded_ones_or_are_given_up_aloud(
    architecture_folder, architecture: str, longest: int
) -> None:
    policy, said = loaded(architecture_folder(architecture))
    assert policy.shares_prompts == (architecture not in PADDED)
    if architecture in PADDED:
        assert any(type(policy.model).__name__ in text for text in said)
    else:
        assert not said
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sequences, packs = groups(longest), policy.packs(longest)
    too_long = policy.shares_prompts and policy.window is not None and longest > policy.window
    assert packs == (policy.shares_prompts and not too_long)
    named = [type(policy.model).__name__ in str(w.message) and "sliding window" in str(w.message) for w in caught]
    assert named == [True] * too_long
    log_probs, gradients = trained(policy, sequences)
    policy.shares_prompts = False
    expected, expected_gradients = trained(policy, sequences)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-5, rtol=1e-3)
