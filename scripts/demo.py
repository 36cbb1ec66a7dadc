"""Post-train SmolLM2-135M-Instruct with GRPO from one YAML and show what it learned on held-out questions.

Phases: fetch the model, measure it, train it, export it, measure the export. Each leaves its result in ``--out`` and
is skipped when that is there; training goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/r1_zero/largest_smollm2.yaml"
# Rows, inner and columns of the model's typical matrix product, whose speed the estimate is made from.
CALIBRATION = (512, 576, 1536)
# What a training iteration costs at that speed, overheads included, and a measurement in iterations: from a whole run
# of the default configuration on two cores.
TFLOP_PER_ITERATION = 8.5
MEASURE_ITERATIONS = 13.0
PANELS = {
    "reward": ["train/reward", "train/rewards/accuracy/mean", "train/rewards/format/mean"],
    "held-out": ["eval/pass@1", "eval/maj@16", "eval/pass@16"],
    "length (tokens)": ["train/completions/mean_length"],
    "entropy (nat)": ["train/entropy"],
}


def main() -> None:
    """Run the phases that are still missing and print the table."""
    args = parse()
    out = Path(args.out)
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(Path(args.config), Path(args.model), out, args.override)
    demo.refuse_other_settings()
    start = time.perf_counter()
    if not args.no_fetch:
        demo.run("model", [sys.executable, "scripts/fetch_model.py", "--out", str(demo.model)])
    demo.announce()
    demo.measure("before", demo.model)
    demo.train()
    demo.export()
    demo.measure("after", demo.exported)
    demo.report(time.perf_counter() - start)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="logs/demo", help="folder of results (default: logs/demo)")
    parser.add_argument("--config", default=str(CONFIG), help="experiment YAML (default: %(default)s)")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder of the model")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results first")
    parser.add_argument("--no-fetch", action="store_true", help="the model's folder is already there")
    parser.add_argument(
        "--override", action="append", default=[], metavar="--KEY=VALUE", help="passed on to lit-posttrain"
    )
    return parser.parse_args()


class Demo:
    """The phases of one demo in one folder.

    Args:
        config: Experiment YAML.
        model: Folder of the model to begin with.
        out: Folder of results.
        overrides: Further arguments of every lit-posttrain command.
    """

    def __init__(self, config: Path, model: Path, out: Path, overrides: list[str]):
        self.config, self.model, self.out, self.overrides = config, model, out, overrides
        self.exported = out / "model"
        self.steps: int = yaml.safe_load(config.read_text())["trainer"]["max_steps"]
        for override in overrides:
            if override.startswith("--trainer.max_steps="):
                self.steps = int(override.split("=")[1])

    def refuse_other_settings(self) -> None:
        """Results of other settings in the same folder would be mixed up with these."""
        text = self.config.read_text() + str(self.model) + repr(self.overrides)
        wanted, stamp = hashlib.sha256(text.encode()).hexdigest(), self.out / "settings.sha256"
        if stamp.exists() and stamp.read_text() != wanted:
            sys.exit(f"[demo] {self.out} holds a demo with other settings; --fresh replaces it, --out keeps it")
        stamp.write_text(wanted)

    def announce(self) -> None:
        """Hardware, precision and how long it will take."""
        import torch

        from lit_posttrain.precision import describe_hardware, multiplies_bfloat16

        cpu = torch.device("cpu")
        steps = self.steps
        rate = gemm_rate(torch.bfloat16 if multiplies_bfloat16(cpu) else torch.float32)
        minutes = steps * TFLOP_PER_ITERATION / rate / 60
        say(describe_hardware(cpu))
        say(
            f"{rate:.2f} TFLOP/s of matrix work right now: about {minutes:.0f} minutes for {steps} iterations of "
            f"training, and {minutes / steps * MEASURE_ITERATIONS:.0f} for each of the two measurements"
        )

    def measure(self, name: str, model: Path) -> None:
        """Sample every held-out prompt and keep each completion with its verdict."""
        target = self.out / f"{name}.jsonl"
        if target.exists():
            say(f"{name}: already measured ({target})")
            return
        run = self.out / "measurements"
        shutil.rmtree(run / name, ignore_errors=True)
        self.run(
            f"measuring {name}",
            [*self.command("validate", model, run, name), "--trainer.limit_val_batches=1.0"],
        )
        (found,) = (run / name).glob("version_*/evaluation/step-0.jsonl")
        partial = target.with_suffix(".part")
        shutil.copyfile(found, partial)
        partial.replace(target)

    def train(self) -> None:
        """Train, from the newest checkpoint where there is one."""
        from lit_posttrain.checkpoint import newest_checkpoint, newest_run

        steps = self.steps
        run = newest_run(self.out / "train")
        newest = newest_checkpoint(run) if run else None
        if newest is not None and newest.step >= steps:
            say(f"training: already done ({newest.path})")
            return
        resume = ["--ckpt_path=last"] if newest is not None else []
        if newest is not None:
            say(f"training: going on from iteration {newest.step} of {steps}")
        self.run("training", self.command("fit", self.model, self.out, "train") + resume)

    def export(self) -> None:
        """Write the trained policy as a HF folder."""
        if (self.exported / "config.json").exists():
            say(f"export: already done ({self.exported})")
            return
        run = self.run_dir()
        arguments = ["export", "--checkpoint", str(run), "--out", str(self.exported)]
        self.run("export", [sys.executable, "-m", "lit_posttrain", *arguments])

    def report(self, seconds: float) -> None:
        """The table, the curves, and the same as JSON."""
        from rich.console import Console

        from lit_posttrain.report.plots import plot_curves, read_scalars
        from lit_posttrain.report.summary import before_after, commonest_answer, read_rows, summarize

        rows = {name: read_rows(self.out / f"{name}.jsonl") for name in ("before", "after")}
        before, after = (summarize(rows[name]) for name in ("before", "after"))
        answer, share = commonest_answer(rows["before"])
        picture = self.out / "curves.png"
        plot_curves(read_scalars(self.run_dir()), PANELS, picture, f"{self.model.name}: {self.config.stem}")
        summary = {
            name: {key: e.value for key, e in table.items()} | {"ci95": {k: [e.low, e.high] for k, e in table.items()}}
            for name, table in (("before", before), ("after", after))
        }
        prompts = len({r["prompt_id"] for r in rows["before"]})
        summary |= {
            "commonest_answer": {"answer": answer, "pass@1": share},
            "held_out_prompts": prompts,
            "samples_per_prompt": len(rows["before"]) // prompts,
            "curves": str(picture),
            "model": str(self.exported),
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        console = Console(width=max(80, min(shutil.get_terminal_size().columns, 120)))
        console.print(before_after(before, after, f"{prompts} held-out questions, 95% intervals"))
        say(f"always giving the commonest answer ({answer}) would score pass@1 {share:.3f}")
        say(f"every sample and verdict: {self.out / 'before.jsonl'}, {self.out / 'after.jsonl'}")
        say(f"summary:     {self.out / 'summary.json'}")
        say(f"curves:      {picture}")
        say(f"TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir {self.out / 'train'}")
        say(f"model:       {self.exported}")
        say(f"finished after {seconds / 60:.1f} minutes of this call")

    def command(self, name: str, model: Path, save_dir: Path, run: str) -> list[str]:
        """A lit-posttrain command on this demo's YAML."""
        return [
            *(sys.executable, "-m", "lit_posttrain", name, "--config", str(self.config)),
            f"--model.policy.model={model}",
            f"--trainer.logger.init_args.save_dir={save_dir}",
            f"--trainer.logger.init_args.name={run}",
            *self.overrides,
        ]

    def run_dir(self) -> Path:
        """The training run."""
        from lit_posttrain.checkpoint import newest_run

        run = newest_run(self.out / "train")
        if run is None:
            sys.exit(f"[demo] {self.out / 'train'} holds no run with a checkpoint")
        return run

    def run(self, phase: str, command: list[str]) -> None:
        """Run one phase in the foreground; a failure or an interruption ends the demo with its exit status."""
        say(f"--- {phase}")
        start = time.perf_counter()
        process, interrupted = subprocess.Popen(command, cwd=ROOT), False
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True  # the child got it too and is saving what it has
        if status != 0:
            hint = "; type the same command to go on" if interrupted or status == 75 else ""
            say(f"{phase} ended with status {status}{hint}")
            sys.exit(status if status > 0 else 128 - status)
        say(f"--- {phase}: {time.perf_counter() - start:.0f} s")


def gemm_rate(dtype: Any) -> float:
    """TFLOP/s of the model's typical matrix product, the median of a second's worth."""
    import torch

    rows, inner, columns = CALIBRATION
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    times = []
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / sorted(times)[len(times) // 2] / 1e12


def say(message: str) -> None:
    """A line of the demo's own."""
    print(f"[demo] {message}", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
