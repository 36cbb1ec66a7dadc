"""Between rollouts the engine holds no copy of the weights."""

import gc
from pathlib import Path

from tiny_runs import fit, grpo, prompts

from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rollout import NativeEngine
from lit_posttrain.rollout.inference import PackedLinear


def packed_layers() -> int:
    gc.collect()
    return sum(isinstance(x, PackedLinear) for x in gc.get_objects())


def test_updates_run_without_the_engines_copy(tiny_model: Path, tmp_path: Path) -> None:
    module = grpo(tiny_model)
    held: dict[str, list[int]] = {"collect": [], "update": []}
    collect, update = module.engine.generate, module.update
    module.engine.generate = lambda *a, **k: (held["collect"].append(packed_layers()), collect(*a, **k))[1]  # type: ignore[method-assign]
    module.update = lambda *a, **k: (held["update"].append(packed_layers()), update(*a, **k))[1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path)
    assert isinstance(module.engine, NativeEngine)
    assert all(n > 0 for n in held["collect"])
    assert held["update"] == [0, 0]


def test_weights_of_the_last_sync_go_at_once(tiny_model: Path) -> None:
    """Not at the next sweep of the garbage collector: it does not know how large they are."""
    policy, engine = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32")), NativeEngine()
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            engine.sync(policy)
            counts.append(sum(isinstance(x, PackedLinear) for x in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] > 0
    assert counts == [counts[0]] * 3
