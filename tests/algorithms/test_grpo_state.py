"""Whatever a run counts is saved: an attribute that training changes and no checkpoint holds fails here."""

from pathlib import Path

from tiny_runs import Watch, fit, grpo, objective, prompts

from lit_posttrain.algorithms import GRPO
from lit_posttrain.reference import ReferenceConfig

# Made anew in every iteration before it is read, so nothing is lost with it.
MADE_ANEW = {
    "seconds",  # of the phases of this iteration
    "_before",  # the parameters' checksums, taken when the iteration begins
    "_current_fx_name",  # Lightning's
    "_results",  # Lightning's
}
COUNTERS = {name: name for name in ("num_tokens", "bad_steps", "episodes", "kl_coef")}


def plain(owner: object) -> dict[str, str]:
    kinds = (int, float, str, dict, list, tuple, type(None))
    return {name: repr(value) for name, value in vars(owner).items() if isinstance(value, kinds)}


def test_every_attribute_that_training_changes_is_in_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[dict[str, str], dict[str, str], dict]] = []

    def note(_: object, module: GRPO) -> None:
        seen.append((plain(module), plain(module.reference), module.counters()))

    module = grpo(tiny_model, objective=objective(kl=0.1), reference=ReferenceConfig(refresh_every=1))
    fit(module, prompts(tiny_model, tmp_path), tmp_path, Watch(note), max_steps=3)
    (first, first_reference, counted), (later, later_reference, counted_later) = seen[0], seen[-1]
    changed = {name for name in later if later[name] != first.get(name)} - MADE_ANEW
    assert {name for name in changed if not name.startswith("__")} <= set(COUNTERS), changed
    for name in changed & set(COUNTERS):
        assert counted[COUNTERS[name]] != counted_later[COUNTERS[name]]
    assert {n for n in later_reference if later_reference[n] != first_reference[n]} == {"refreshed_at"}
    assert counted["reference"]["refreshed_at"] != counted_later["reference"]["refreshed_at"]
