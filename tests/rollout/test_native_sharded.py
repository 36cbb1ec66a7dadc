"""The native engine over sharded parameters: each rank draws what one process draws, however much work it has."""

import os
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig
from lit_posttrain.rollout import NativeEngine, ReferenceEngine, RolloutEngine, SamplingParams
from lit_posttrain.sharding import full_tensor, shard
from lit_posttrain.types import Completion, SamplingKey

# Of each rank and rollout: how many completions, and how long they may be.
WORK = [[(9, 12), (0, 5), (3, 1)], [(2, 3), (7, 20), (0, 1)]]
SEQUENCES = pad_sequences([[5, 6, 7], [8, 9]], [[1, 2], [3, 4, 5]])


def policy_of(model: Path, dtype, lora: bool) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # adapters start at random
        return Policy(
            PolicyConfig(model=str(model), compute_dtype=dtype, lora=LoraConfig(r=4, alpha=8) if lora else None)
        )


def rollouts(policy: Policy, engine: RolloutEngine, rank: int) -> list[list[Completion]]:
    """Three, the weights changing after each; nothing but ``sync`` is entered by both ranks."""
    drawn = []
    for iteration, (n, limit) in enumerate(WORK[rank]):
        engine.sync(policy)
        keys = [SamplingKey(1, "rollout", iteration, i, rank) for i in range(n)]
        params = SamplingParams(max_new_tokens=limit, stop_token_ids=list(range(0, 258, 9)))
        drawn.append(engine.generate([[40 + i // 2, 41, 42][: 1 + i // 2] for i in range(n)], params, keys))
        with torch.no_grad():
            for _, p in policy.trainable():
                p.mul_(1.2).add_(0.05)
        policy.sync()
    return drawn


def score(policy: Policy) -> torch.Tensor:
    log_probs = policy(SEQUENCES, SEQUENCES.completion_mask(), 1.0).log_probs
    log_probs.sum().backward()
    return log_probs.detach()


def child(rank: int, port: int, model: Path, out: Path, dtype, lora: bool) -> None:
    torch.set_num_threads(1)  # with two threads a forked child hangs once its parent used OpenMP
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        policy = policy_of(model, dtype, lora)
        policy.build_view(torch.device("cpu"), sharded=True)
        assert policy.compute_dtype is not None
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
        shard(policy, mesh, policy.compute_dtype, Policy.entry_points)
        engine = NativeEngine(max_rows=4)
        drawn = rollouts(policy, engine, rank)
        # Training goes on afterwards, still sharded.
        scored = score(policy)
        gradients = [full_tensor(p.grad) for _, p in policy.trainable() if p.grad is not None]
        result = {
            "native": engine.fallback is None,
            "drawn": [[(c.token_ids, c.log_probs) for c in made] for made in drawn],
            "scored": scored,
            "gradients": gradients,
        }
        torch.save(result, out / f"rank{rank}.pt")
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(("dtype", "lora"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.trap(43)
def test_sharded_policies_are_sampled_as_whole_ones(tiny_model: Path, tmp_path: Path, dtype, lora: bool) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(child, args=(port, tiny_model, tmp_path, dtype, lora), nprocs=2, start_method="fork")
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert result["native"]
        policy = policy_of(tiny_model, dtype, lora)
        # In bfloat16 other kernels round otherwise: the engine itself is the measure.
        whole = NativeEngine(max_rows=4) if dtype == "bfloat16" else ReferenceEngine()
        expected = rollouts(policy, whole, rank)
        assert len(set(map(len, expected))) > 1
        for made, completions in zip(result["drawn"], expected, strict=True):
            assert [tokens for tokens, _ in made] == [c.token_ids for c in completions]
            for (_, log_probs), c in zip(made, completions, strict=True):
                assert log_probs == pytest.approx(c.log_probs, abs=1e-4)
        tolerance = 1e-4 if dtype == "float32" else 0.1
        torch.testing.assert_close(result["scored"], score(policy), atol=tolerance, rtol=tolerance)
        gradients = [p.grad for _, p in policy.trainable() if p.grad is not None]
        assert len(gradients) == len(result["gradients"])
        if dtype == "float32":
            for a, b in zip(result["gradients"], gradients, strict=True):
                torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()) + 1e-6, rtol=1e-3)
