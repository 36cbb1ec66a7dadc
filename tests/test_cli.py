"""The command line as a user types it, over small stand-ins for models and data."""

import subprocess
import sys
from pathlib import Path

import cli_stand_ins
import pytest
import torch
import yaml

from lit_posttrain import cli


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs one command in an empty folder that holds ``base.yaml``; returns what ran: (trainer, model), if anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cli_stand_ins.Spy, "seen", [])
    Path("base.yaml").write_text(cli_stand_ins.BASE)

    def run(*words):
        cli.dispatch(list(words), lambda: (cli_stand_ins.ModelBase, cli_stand_ins.DataBase))
        return cli_stand_ins.Spy.seen[-1] if cli_stand_ins.Spy.seen else None

    return run


def refused(run, capsys, *words):
    """Runs a command that must end in one line; returns (exit status, that line)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("lit-posttrain: ")] == lines[-1:]
    assert not any("Traceback" in line for line in lines)
    return stop.value.code, lines[-1]


def config(run_dir, name="config.yaml"):
    return yaml.safe_load(Path(run_dir, name).read_text())


RUN = Path("logs/tiny/version_0")


def test_what_needs_no_torch_does_not_import_it(tmp_path):
    (tmp_path / "bad.yaml").write_text("trainer: {max_steps: 3")
    (tmp_path / "precision.yaml").write_text("trainer: {precision: bf16-true}")
    code = """
import sys
from lit_posttrain.cli import main
FILES = ["absent", "bad", "precision"]
for words in (["--help"], [], ["export", "--help"], ["ft"], *(["fit", "--config", f"{f}.yaml"] for f in FILES)):
    try:
        main(words)
    except SystemExit as stop:
        print(stop.code)
heavy = {"torch", "lightning", "transformers", "jsonargparse"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    for command in ("fit", "validate", "test", "predict", "export"):
        assert f"\n  {command} " in done.stdout
    assert done.stdout.split()[-5:] == ["0", "2", "2", "2", "2"]
    assert len(done.stderr.splitlines()) == 4


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}


def test_module_runs_the_same_command_line(tmp_path):
    words = [sys.executable, "-m", "lit_posttrain", "expotr"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stderr) == (2, "lit-posttrain: unknown command 'expotr'; did you mean 'export'?\n")


def test_print_config_is_the_whole_run_and_runs_again(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", "base.yaml", "--model.group_size=3", "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    arguments = yaml.safe_load(printed)["model"]["init_args"]
    assert arguments["group_size"] == 3
    assert arguments["scores"][0]["init_args"] == {"strict": True, "weight": 0.5}
    assert arguments["optimizer"]["init_args"]["betas"] == [0.9, 0.999]
    assert arguments["policy"]["compute_dtype"] == "auto"
    Path("printed.yaml").write_text(printed)
    trainer, model = run("fit", "--config", "printed.yaml")
    assert trainer.global_step == 2
    assert model.group_size == 3


def test_default_optimizer_takes_single_arguments(run):
    text = cli_stand_ins.BASE
    Path("base.yaml").write_text(text[: text.index("    optimizer:")] + text[text.index("data:") :])
    _, model = run("fit", "--config", "base.yaml", "--model.optimizer.lr=0.5")
    optimizer = model.optimizer(model.parameters())
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 0.5


def test_later_words_and_files_win(run):
    Path("hardware.yaml").write_text("trainer: {max_steps: 3, devices: 1}\n")
    words = ("fit", "--config", "base.yaml", "--config=hardware.yaml")
    trainer, _ = run(*words)
    assert trainer.global_step == 3
    trainer, _ = run(*words, "--trainer.max_steps", "1")
    assert trainer.global_step == 1


@pytest.mark.parametrize(("words", "expected"), [((), "some/model"), (("--model.policy.tokenizer=other",), "other")])
def test_data_gets_the_policys_tokenizer(run, words, expected):
    trainer, _ = run("fit", "--config", "base.yaml", *words)
    assert trainer.datamodule.tokenizer == expected


def test_data_without_a_tokenizer_is_not_given_one(run):
    trainer, _ = run("fit", "--config", "base.yaml", "--data=cli_stand_ins.NoTokenizer")
    assert trainer.datamodule.tokenizer == "none"


def test_config_is_saved_with_the_run_and_reproduces_it(run):
    run("fit", "--config", "base.yaml", "--model.group_size=5")
    assert config(RUN)["model"]["init_args"]["group_size"] == 5
    trainer, model = run("fit", "--config", f"{RUN}/config.yaml")
    assert model.group_size == 5
    assert Path(trainer.log_dir) == RUN.with_name("version_1")
    assert config(trainer.log_dir) == config(RUN)


def test_validation_does_not_replace_the_config_of_the_run(run):
    run("fit", "--config", "base.yaml")
    before = (RUN / "config.yaml").read_bytes()
    run("validate", "--config", "base.yaml", "--trainer.logger.version=0", "--trainer.limit_val_batches=1")
    assert (RUN / "config.yaml").read_bytes() == before
    assert config(RUN, "validate.yaml")["trainer"]["limit_val_batches"] == 1


def test_a_new_run_does_not_replace_one_that_can_be_resumed(run, capsys):
    run("fit", "--config", "base.yaml")
    before = (RUN / "config.yaml").read_bytes()
    words = ("fit", "--config", "base.yaml", "--trainer.logger.version=0", "--trainer.max_steps=3")
    code, line = refused(run, capsys, *words)
    assert (code, "logs/tiny/version_0 holds the checkpoints" in line) == (2, True)
    assert (RUN / "config.yaml").read_bytes() == before
    trainer, _ = run(*words, "--ckpt_path=last")
    assert trainer.global_step == 3


def test_without_a_logger_nothing_lands_in_the_current_folder(run):
    run("fit", "--config", "base.yaml", "--trainer.logger=false", "--trainer.callbacks=null")
    assert sorted(path.name for path in Path().iterdir()) == ["base.yaml"]


def test_modules_in_the_current_folder_are_found(run):
    Path("my_own_scores.py").write_text(
        "from cli_stand_ins import Exact\nclass Mine(Exact):\n    def score(self):\n        return 7.0\n"
    )
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(Path.cwd()))]
    _, model = run("fit", "--config", "base.yaml", "--model.scores=[{class_path: my_own_scores.Mine}]")
    assert model.scores[0].score() == 7.0


def test_last_goes_on_in_the_same_folder_with_one_curve(run, capsys):
    run("fit", "--config", "base.yaml", "--seed_everything=1")
    first = config(RUN)
    capsys.readouterr()
    words = ("fit", "--config", "base.yaml", "--seed_everything=1", "--ckpt_path", "last", "--trainer.max_steps=4")
    trainer, model = run(*words, "--model.optimizer.lr=0.5")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lit-posttrain: ")]
    assert said == [
        "lit-posttrain: going on from logs/tiny/version_0/checkpoints/step-2 (step 2)",
        "lit-posttrain: model.init_args.optimizer.init_args.lr: 1e-06 in version_0, 0.5 now",
        "lit-posttrain: trainer.max_steps: 2 in version_0, 4 now",
        "lit-posttrain: the state of optimizer and scheduler, learning rate included, comes from the checkpoint, "
        "not these keys",
    ]
    assert trainer.global_step == 4
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == 1e-6
    assert [path.name for path in Path("logs/tiny").iterdir()] == ["version_0"]
    assert trainer.logger._kwargs["purge_step"] == 3
    # What is saved describes the run as if it had never been interrupted, and so runs again from the start.
    first["trainer"]["max_steps"], first["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 4, 0.5
    assert config(RUN) == first


def test_last_means_the_newest_run_that_can_be_resumed(run, capsys):
    run("fit", "--config", "base.yaml")
    run("fit", "--config", "base.yaml", "--trainer.max_steps=3")
    Path("logs/tiny/version_7").mkdir()
    trainer, _ = run("fit", "--config", "base.yaml", "--trainer.max_steps=4", "--ckpt_path=last")
    assert Path(trainer.log_dir).name == "version_1"
    assert "step-3 (step 3)" in capsys.readouterr().out


def test_last_of_the_default_logger(run):
    Path("base.yaml").write_text("\n".join(x for x in cli_stand_ins.BASE.splitlines() if "logger" not in x))
    run("fit", "--config", "base.yaml")
    trainer, _ = run("fit", "--config", "base.yaml", "--trainer.max_steps=3", "--ckpt_path=last")
    assert Path(trainer.log_dir).parts[-2:] == ("lightning_logs", "version_0")
    assert trainer.global_step == 3


@pytest.mark.parametrize("damage", [False, True])
def test_last_with_nothing_there_is_an_error_of_its_own(run, capsys, damage):
    if damage:
        run("fit", "--config", "base.yaml")
        state = RUN / "checkpoints/step-2/state.ckpt"
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    code, line = refused(run, capsys, "fit", "--config", "base.yaml", "--ckpt_path=last")
    assert code == 4
    assert "logs/tiny/version_*" in line


@pytest.mark.parametrize("path", [RUN, RUN / "checkpoints/step-2", RUN / "checkpoints/step-2/state.ckpt"])
def test_a_path_starts_a_new_run_from_its_state(run, capsys, path):
    run("fit", "--config", "base.yaml")
    trainer, model = run("fit", "--config", "base.yaml", "--trainer.max_steps=3", f"--ckpt_path={path}")
    assert trainer.global_step == 3
    assert model.group_size == 2
    assert Path(trainer.log_dir).name == "version_1"
    assert config(trainer.log_dir)["ckpt_path"] == str(RUN / "checkpoints/step-2/state.ckpt")
    assert "trainer.max_steps: 2 in version_0, 3 now" in capsys.readouterr().out


def test_a_checkpoint_path_that_is_not_there(run, capsys):
    code, line = refused(run, capsys, "fit", "--config", "base.yaml", "--ckpt_path=logs/nope")
    assert (code, "logs/nope not found" in line) == (2, True)


@pytest.mark.parametrize(
    "fault", ["model.fault=value@init", "model.fault=value@configure_model", "data.fault=value@setup"]
)
def test_what_the_user_can_mend_is_one_line(run, capsys, fault):
    assert refused(run, capsys, "fit", "--config", "base.yaml", f"--{fault}") == (
        2,
        "lit-posttrain: group_size: mend it",
    )


@pytest.mark.parametrize(
    ("word", "instead"),
    [("gradient_clip_val=1.0", "init_args.max_grad_norm"), ("accumulate_grad_batches=2", "init_args.token_budget")],
)
def test_keys_that_lightning_refuses_for_our_steps_name_ours(run, capsys, word, instead):
    code, line = refused(run, capsys, "fit", "--config", "base.yaml", f"--trainer.{word}")
    assert (code, line.startswith(f"lit-posttrain: trainer.{word.split('=')[0]}: "), instead in line) == (2, True, True)


def test_a_missing_data_file_is_one_line(run, capsys):
    code, line = refused(run, capsys, "fit", "--config", "base.yaml", "--data.fault=missing@train_dataloader")
    assert (code, "No such file" in line, "rows.jsonl" in line) == (2, True, True)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("bug@init", RuntimeError), ("value@training_step", ValueError), ("value@setup_in_step", ValueError)],
)
def test_a_bug_keeps_its_traceback(run, fault, kind):
    with pytest.raises(kind) as bug:
        run("fit", "--config", "base.yaml", f"--model.fault={fault}")
    assert "_raise" in [entry.name for entry in bug.traceback]


def test_a_stop_keeps_its_exit_status(run):
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", "base.yaml", "--model.fault=stop@training_step")
    assert stop.value.code == 75


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("reward@training_step", (3, "lit-posttrain: scores[0] gave only invalid verdicts")),
        ("gate@configure_model", (3, "lit-posttrain: no parameter is trainable")),
        ("disk@training_step", (2, "lit-posttrain: cannot save step-2: no space left")),
    ],
)
def test_what_stops_a_run_on_purpose_says_why_in_one_line(run, capsys, fault, expected):
    assert refused(run, capsys, "fit", "--config", "base.yaml", f"--model.fault={fault}") == expected


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--checkpoint", "x"), "missing --out"),
        (("--chekpoint", "x", "--out", "y"), "unknown option --chekpoint; did you mean '--checkpoint'?"),
        (("--check", "x", "--out", "y"), "unknown option --check; did you mean '--checkpoint'?"),
        (("--checkpoint", "last", "--out", "y"), "needs --config"),
        (("--checkpoint", "x", "--out", "y", "--config", "base.yaml"), "only for --checkpoint last"),
        (("--checkpoint", "x", "--out", "y"), "checkpoint x not found"),
        (("--checkpoint", "logs", "--out", "."), "is not an empty folder"),
    ],
)
def test_export_refuses_in_one_line(run, capsys, words, part):
    code, line = refused(run, capsys, "export", *words)
    assert code == 2
    assert part in line


def test_export_of_last_needs_a_run(run, capsys):
    words = ("export", "--checkpoint", "last", "--config", "base.yaml", "--out", "out")
    assert refused(run, capsys, *words)[0] == 4
