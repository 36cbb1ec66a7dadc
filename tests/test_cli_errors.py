"""Every mistake in a configuration is one line that names the key, its place, and what was meant."""

import sys
from pathlib import Path

import cli_stand_ins
import pytest

from lit_posttrain import cli
from lit_posttrain.cli_config import UserError, check, options, read

OPTION, NEW_FILE = "command line", "over.yaml line 1"
SCORES = "model: {{init_args: {{scores: [{}]}}}}"
OPTIMIZER = "model: {{init_args: {{optimizer: {}}}}}"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("base.yaml").write_text(cli_stand_ins.BASE)


def line_of(capsys, *words):
    """The one line, and nothing else, that a refused command says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.dispatch(list(words), lambda: (cli_stand_ins.ModelBase, cli_stand_ins.DataBase))
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith("lit-posttrain: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("lit-posttrain: ").strip()


def unknown(path, place, tail):
    return f"unknown key {path} ({place}){tail}"


def meant(name):
    return f"; did you mean '{name}'?"


ON_COMMAND_LINE = [
    ("--modl.group_size=3", unknown("modl", OPTION, meant("model"))),
    ("--model.init_args.group_sise=3", unknown("model.init_args.group_sise", OPTION, meant("group_size"))),
    ("--model.group_sise=3", unknown("model.init_args.group_sise", OPTION, meant("group_size"))),
    ("--model.polic.model=x", unknown("model.init_args.polic", OPTION, meant("policy"))),
    ("--model.policy.modle=x", unknown("model.init_args.policy.modle", OPTION, meant("model"))),
    ("--model.policy.lora.rank=3", unknown("model.init_args.policy.lora.rank", OPTION, "; valid: r")),
    ("--model.sampling.temprature=1", unknown("model.init_args.sampling.temprature", OPTION, meant("temperature"))),
    ("--model.scores.wieght=3", unknown("model.init_args.scores[0].init_args.wieght", OPTION, meant("weight"))),
    ("--model.optimizer.lrr=3", unknown("model.init_args.optimizer.init_args.lrr", OPTION, meant("lr"))),
    ("--data.batchsize=3", unknown("data.init_args.batchsize", OPTION, meant("batch_size"))),
    ("--trainer.max_stps=3", unknown("trainer.max_stps", OPTION, meant("max_steps"))),
    ("--max_steps=3", unknown("max_steps", OPTION, meant("trainer.max_steps"))),
    ("--trainer.logger.save_dri=x", unknown("trainer.logger.init_args.save_dri", OPTION, meant("save_dir"))),
    ("--seed_everthing=3", unknown("seed_everthing", OPTION, meant("seed_everything"))),
    # Abbreviations, which argparse takes unless told otherwise.
    ("--trainer.max_step=3", unknown("trainer.max_step", OPTION, meant("max_steps"))),
    ("--model.policy.compute=auto", unknown("model.init_args.policy.compute", OPTION, meant("compute_dtype"))),
    ("--model.init_args.policy.tok=x", unknown("model.init_args.policy.tok", OPTION, meant("tokenizer"))),
    ("--data.batch=1", unknown("data.init_args.batch", OPTION, meant("batch_size"))),
    ("--ckpt=last", unknown("ckpt", OPTION, meant("ckpt_path"))),
    # Wrong types.
    ("--model.group_size=8.0", f"model.init_args.group_size ({OPTION}) must be int, not '8.0'"),
    ("--trainer.max_steps=few", f"trainer.max_steps ({OPTION}) must be int, not 'few'"),
    ("--model.optimizer.lr=fast", f"model.init_args.optimizer.init_args.lr ({OPTION}) must be float"),
    ("--model.clip=[0.1]", f"model.init_args.clip ({OPTION}) must be tuple[float, float], not [0.1]"),
    (
        "--model.policy.compute_dtype=float23",
        f"model.init_args.policy.compute_dtype ({OPTION}) must be one of auto, float32, bfloat16, not 'float23'"
        + meant("float32"),
    ),
    # Classes.
    ("--model=Tinny", f"model.class_path ({OPTION}): no class 'Tinny'{meant('Tiny')}"),
    ("--model=cli_stand_ins.Tinny", f"model.class_path ({OPTION}): cli_stand_ins has no 'Tinny'{meant('Tiny')}"),
    (
        "--model=cli_stand_in.Tiny",
        f"model.class_path ({OPTION}): no module 'cli_stand_in' to import for cli_stand_in.Tiny"
        + meant("cli_stand_ins.Tiny"),
    ),
    ("--data=torch.nn.Linear", f"data.class_path ({OPTION}): torch.nn.Linear is no subclass of DataBase"),
    ("--trainer.callbacks+=ModelCheckpont", f"no class 'ModelCheckpont'{meant('ModelCheckpoint')}"),
    ("--trainer.precision=bf16-true", "model.init_args.policy.compute_dtype"),
    ("--data.tokenizer=x", f"data.init_args.tokenizer is 'x' ({OPTION}), but data always uses the policy's tokenizer"),
    ("--model.policy.lora=null", f"model.init_args.policy.lora ({OPTION}) cannot be null on the command line"),
    ("stray", "unrecognized arguments: stray"),
]


@pytest.mark.parametrize(("word", "expected"), ON_COMMAND_LINE)
def test_on_the_command_line(capsys, word, expected):
    assert expected in line_of(capsys, "fit", "--config", "base.yaml", word)


IN_A_FILE = [
    ("modl: {}", unknown("modl", NEW_FILE, meant("model"))),
    ("max_steps: 3", unknown("max_steps", NEW_FILE, meant("trainer.max_steps"))),
    ("trainer: {max_step: 3}", unknown("trainer.max_step", NEW_FILE, meant("max_steps"))),
    ("trainer: 3", f"trainer must be a mapping of keys ({NEW_FILE}), not 3"),
    ("model: {class_path: Tiny, init_arg: {}}", unknown("model.init_arg", NEW_FILE, meant("init_args"))),
    (
        "model: {class_path: Tiny, group_size: 2}",
        unknown("model.group_size", NEW_FILE, meant("model.init_args.group_size")),
    ),
    # init_args may be left out where a file before has named the class.
    ("model: {group_sise: 2}", unknown("model.init_args.group_sise", NEW_FILE, meant("group_size"))),
    # The parser by itself would take these in silence.
    ("model: {init_args: {policy: {lorra: {}}}}", unknown("model.init_args.policy.lorra", NEW_FILE, meant("lora"))),
    (
        "model: {init_args: {policy: {tokenizer: '# mine'}}}",
        f"model.init_args.policy.tokenizer ({NEW_FILE}) is '# mine', which would be read as a comment, and so as null",
    ),
    ("model: {init_args: {scorse: []}}", unknown("model.init_args.scorse", NEW_FILE, meant("scores"))),
    ("model: {init_args: {policy: {modl: x}}}", unknown("model.init_args.policy.modl", NEW_FILE, meant("model"))),
    (
        SCORES.format("{class_path: cli_stand_ins.Exact, init_args: {wieght: 1}}"),
        unknown("model.init_args.scores[0].init_args.wieght", NEW_FILE, meant("weight")),
    ),
    (
        SCORES.format("{class_path: Exact}, {class_path: Exact, weight: 1}"),
        unknown("model.init_args.scores[1].weight", NEW_FILE, meant("model.init_args.scores[1].init_args.weight")),
    ),
    (SCORES.format("Exakt"), f"model.init_args.scores[0] ({NEW_FILE}): no class 'Exakt'{meant('Exact')}"),
    (
        SCORES.format("{class_path: cli_stand_ins.Exact, init_args: {weight: much}}"),
        f"model.init_args.scores[0].init_args.weight ({NEW_FILE}) must be float, not 'much'",
    ),
    (
        "model: {init_args: {scores: {class_path: cli_stand_ins.Exact}}}",
        f"model.init_args.scores ({NEW_FILE}) must be a list",
    ),
    (
        "model: {init_args: {by_source: {gsm8k: {class_path: Exact, init_args: {strikt: no}}}}}",
        unknown("model.init_args.by_source.gsm8k.init_args.strikt", NEW_FILE, meant("strict")),
    ),
    (
        OPTIMIZER.format("{class_path: torch.optim.AdmW}"),
        f"model.init_args.optimizer.class_path ({NEW_FILE}): torch.optim has no 'AdmW'{meant('AdamW')}",
    ),
    (
        OPTIMIZER.format("{class_path: torch.optim.SGD, init_args: {beta: 1}}"),
        unknown("model.init_args.optimizer.init_args.beta", NEW_FILE, "; valid: lr, momentum"),
    ),
    (OPTIMIZER.format("{class_path: cli_stand_ins.Exact}"), "cli_stand_ins.Exact is no subclass of Optimizer"),
    ("model: {init_args: {policy: some/model}}", f"policy ({NEW_FILE}) must be a mapping of keys, not 'some/model'"),
    ("model: {init_args: {policy: null}}", f"policy ({NEW_FILE}) must be a mapping of keys, not null"),
    ("data: {init_args: {tokenizer: x}}", f"data.init_args.tokenizer is 'x' ({NEW_FILE})"),
    ("trainer: {precision: 16-mixed}", f"trainer.precision is 16-mixed ({NEW_FILE})"),
    ("trainer: {max_steps: 3", "over.yaml line 1: not valid YAML"),
    ("trainer:\n  max_steps: 3\n  max_steps: 4", "over.yaml line 3: key trainer.max_steps is given twice"),
    ("- trainer", "over.yaml: a config file holds a mapping of keys"),
    ("trainer:\n\tmax_steps: 3", "over.yaml line 2: not valid YAML"),
]


@pytest.mark.parametrize(("text", "expected"), IN_A_FILE)
def test_in_a_file(capsys, text, expected):
    Path("over.yaml").write_text(text)
    assert expected in line_of(capsys, "fit", "--config", "base.yaml", "--config", "over.yaml")


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ("      model: some/model\n", "model.init_args.policy"),
        ("    policy:\n      model: some/model\n", "missing key model.init_args.policy (base.yaml line 14)"),
        ("data:\n  class_path: cli_stand_ins.Numbers\n", "missing key data"),
    ],
)
def test_what_is_missing(capsys, without, expected):
    assert without in cli_stand_ins.BASE
    Path("base.yaml").write_text(cli_stand_ins.BASE.replace(without, ""))
    assert expected in line_of(capsys, "fit", "--config", "base.yaml")


def test_a_key_missing_in_a_described_part(capsys):
    Path("base.yaml").write_text(cli_stand_ins.BASE.replace("      model: some/model", "      compute_dtype: auto"))
    assert (
        line_of(capsys, "fit", "--config", "base.yaml")
        == "missing key model.init_args.policy.model (base.yaml line 15)"
    )


def test_a_class_whose_module_fails_to_import(capsys):
    Path("broken_scores.py").write_text("raise KeyError('x')\n")
    Path("wants_more.py").write_text("import not_installed_anywhere\n")
    words = ("fit", "--config", "base.yaml")
    sys.path.insert(0, str(Path.cwd()))
    said = line_of(capsys, *words, "--model.scores=[{class_path: broken_scores.Mine}]")
    assert "model.init_args.scores[0].class_path" in said
    assert "cannot import broken_scores: KeyError: 'x'" in said
    said = line_of(capsys, *words, "--model.scores=[{class_path: wants_more.Mine}]")
    assert "cannot import wants_more: No module named 'not_installed_anywhere'" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("fitt",), "unknown command 'fitt'; did you mean 'fit'?"),
        (("tarin",), "unknown command 'tarin'"),
        (("--config", "base.yaml", "fit"), "the command comes first"),
        (("fit", "--config", "bas.yaml"), "config file bas.yaml not found; did you mean 'base.yaml'?"),
        (("fit", "--config"), "--config needs the path"),
        (("fit", "--config", "."), "cannot read config file ."),
        (("fit", *["--config", "base.yaml"] * 3), "--config base.yaml is file number 3"),
        (("fit", "-c", "base.yaml", "--config=base.yaml", "-cbase.yaml"), "--config base.yaml is file number 3"),
        (("fit", "--conf", "base.yaml"), "unknown key conf (command line)"),
    ],
)
def test_commands_and_files(capsys, words, expected):
    assert expected in line_of(capsys, *words)


def test_a_misspelt_key_is_named_before_what_is_missing_for_it(capsys):
    Path("base.yaml").write_text(cli_stand_ins.BASE.replace("    policy:", "    polcy:"))
    assert line_of(capsys, "fit", "--config", "base.yaml") == unknown(
        "model.init_args.polcy", "base.yaml line 15", meant("policy")
    )


def test_options_are_read_as_the_parser_reads_them():
    words = ["--a.b", "1", "--c=d=e", "--flag", "-c", "x", "-cy", "stray", "--n", "-1"]
    assert list(options(words)) == [
        ("a.b", "1"),
        ("c", "d=e"),
        ("flag", None),
        ("config", "x"),
        ("config", "y"),
        ("n", "-1"),
    ]


def test_another_class_drops_the_arguments_of_the_one_before():
    Path("over.yaml").write_text("model: {init_args: {optimizer: {class_path: SGD, init_args: {momentum: 0.9}}}}")
    tree = read(["--config", "base.yaml", "--config", "over.yaml"])
    assert tree.get("model.optimizer.init_args") == {"momentum": 0.9}
    assert tree.get("model.policy") == {"model": "some/model"}


@pytest.mark.parametrize("precision", ["32-true", "32", "null"])
def test_full_precision_may_be_written_out(precision):
    check(read(["--config", "base.yaml", f"--trainer.precision={precision}"]))
    with pytest.raises(UserError, match="compute_dtype"):
        check(read(["--config", "base.yaml", "--trainer.precision=16-true"]))
