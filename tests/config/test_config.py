"""Configuration and command line: what is accepted, what is refused and with which words."""

import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rayfuse import cli
from rayfuse.config import STAGES, Config, InfiFusion, Section, apply_override, config_json, load_config, parse_config
from rayfuse.config.public import public_config
from rayfuse.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
RAYFUSE = str(Path(sys.executable).with_name("rayfuse"))
MINIMAL = """\
student: microsoft/phi-4
teachers: [Qwen/Qwen2.5-14B-Instruct, mistralai/Mistral-Small-24B-Instruct-2501]
data: train.jsonl
stages: [infifusion]
output: runs/phi4-fused
"""


def tree(**changes):
    """The minimal run as a tree, with some keys changed."""
    return {**yaml.safe_load(MINIMAL), **changes}


def stage(**keys):
    return tree(stages=[{"method": "infifusion", **keys}])


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


# --- what is accepted ------------------------------


def test_minimal_run_has_at_most_twelve_lines_and_papers_defaults(minimal):
    assert len(MINIMAL.splitlines()) <= 12
    config = load_config(minimal)
    assert config.student.model == "microsoft/phi-4"
    assert [teacher.name for teacher in config.teachers] == [
        "Qwen2.5-14B-Instruct",
        "Mistral-Small-24B-Instruct-2501",
    ]
    assert [teacher.weight for teacher in config.teachers] == [1.0, 1.0]
    assert config.signals.k == 10
    assert config.stages == (InfiFusion(lam=0.03, standardized=True, space="logits", over_teachers="sum"),)
    assert config.store_url == "runs/phi4-fused/signals"
    assert config.evaluate is None
    assert config.stage_folder(0) == Path("runs/phi4-fused/stages/01-infifusion")


def test_strings_are_short_for_sections():
    long = tree(
        student={"model": "microsoft/phi-4"},
        teachers=[{"model": name} for name in tree()["teachers"]],
        data={"path": "train.jsonl"},
        stages=[{"method": "sft"}, {"method": "infifusion"}],
        evaluate={"path": "eval.jsonl"},
    )
    short = tree(stages=["sft", "infifusion"], evaluate="eval.jsonl")
    assert parse_config(short) == parse_config(long)


def test_yaml_floats_without_a_point_are_numbers():
    assert parse_config(stage(learning_rate=yaml.safe_load("1e-3"))).stages[0].learning_rate == 1e-3


def test_a_name_set_by_hand_stays():
    teachers = [{"model": "a/same", "name": "first"}, {"model": "b/same", "name": None}]
    assert [teacher.name for teacher in parse_config(tree(teachers=teachers)).teachers] == ["first", "same"]


def test_sft_needs_no_teachers():
    assert parse_config({**tree(stages=["sft"]), "teachers": []}).teachers == ()


def test_config_is_frozen(minimal):
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.stages[0].lam = 0.1
    with pytest.raises(ValidationError, match="frozen"):
        config.teachers[0].replicas.max = 9


def test_sections_may_be_shared_by_anchors(tmp_path):
    path = tmp_path / "run.yaml"
    shared = "stages: [&first {method: sft, steps: 9, keep: 1}, {<<: *first, method: infifusion, steps: 5}]"
    path.write_text(MINIMAL.replace("stages: [infifusion]", shared))
    first, second = load_config(path).stages
    assert (first.method, first.steps, first.keep) == ("sft", 9, 1)
    assert (second.method, second.steps, second.keep) == ("infifusion", 5, 1)


# --- what is refused ------------------------------

REFUSED = {
    "unknown key": (tree(colour="blue"), "colour: there is no such key"),
    "unknown key of a stage": (
        tree(stages=[{"method": "sft", "lam": 0.5}]),
        "stages.0.lam: there is no such key",
    ),
    "unknown key of a section": (tree(signals={"k": 5, "temperature": 2}), "signals.temperature: there is no such key"),
    "missing section": ({k: v for k, v in tree().items() if k != "student"}, "student: is missing"),
    "missing model": (tree(teachers=[{"dtype": "float32"}]), "teachers.0.model: is missing"),
    "wrong type": (tree(seed="many"), r"seed: .*valid integer.*'many'"),
    "not a section": (tree(student=5), r"student: .*\(is 5\)"),
    "not a teacher": (tree(teachers=[5]), r"teachers.0: .*\(is 5\)"),
    "not a list": (tree(teachers="one/teacher"), r"teachers: .*\(is 'one/teacher'\)"),
    "too small": (tree(signals={"k": 1}), r"signals.k: .*greater than or equal to 2 \(is 1\)"),
    "two z-scored ranks": (stage(k=2), r"stages.0: k 2 is too few: two z-scored values are always .*use 3 or more"),
    "two z-scored ranks by signals.k": (
        tree(signals={"k": 2}),
        r"stages.0 \(infifusion\): signals.k 2 is too few: two z-scored values",
    ),
    "two ranks of graphs": (
        tree(stages=[{"method": "infigfusion", "space": "probs"}], signals={"k": 2}),
        r"stages.0 \(infigfusion\): signals.k 2 is too few",
    ),
    "two scaled ranks": (
        tree(stages=[{"method": "multilevelot", "k": 2}]),
        "stages.0: k 2 is too few: two logits divided by their deviation always differ by 1.41",
    ),
    "lam and balance": (
        stage(lam=0.2, balance=0.3),
        r"stages.0: give lam or balance, not both \(lam=0.2, balance=0.3\)",
    ),
    "no balance": (stage(balance=0), r"stages.0.balance: .*greater than 0 \(is 0\)"),
    "a beta of one": (stage(betas=[0.9, 1.0]), r"stages.0.betas.1: .*less than 1 \(is 1.0\)"),
    "too large": (stage(lam=1.5), r"stages.0.lam: .*less than or equal to 1 \(is 1.5\)"),
    "zero learning rate": (stage(learning_rate=0), r"stages.0.learning_rate: .*greater than 0 \(is 0\)"),
    "infinite": (stage(learning_rate=float("inf")), r"stages.0.learning_rate: .*finite number \(is inf\)"),
    "not a number": (stage(grad_clip=float("nan")), r"stages.0.grad_clip: .*finite number \(is nan\)"),
    "warm-up of the whole run": (stage(warmup=1), r"stages.0.warmup: .*less than 1 \(is 1\)"),
    "no step": (stage(steps=0), r"stages.0.steps: .*greater than or equal to 1 \(is 0\)"),
    "a switch for a number": (stage(steps=True), r"stages.0.steps: must be a number \(is True\)"),
    "none of the choices": (stage(space="cosine"), r"stages.0.space: .*'logits' or 'probs' \(is 'cosine'\)"),
    "number format": (
        tree(student={"model": "a", "dtype": "int8"}),
        r"student.dtype: .*'float32' or 'bfloat16' \(is 'int8'\)",
    ),
    "unknown method": (
        tree(stages=["distill"]),
        r"stages.0: unknown method 'distill'; there are: sft, infifusion",
    ),
    "password in a URL": (
        tree(signals={"store": "sftp://u:secret@h/p"}),
        r"signals.store: has a user name or password",
    ),
    "teacher named like a folder of the run": (
        tree(teachers=[{"model": "a/b", "name": "model"}]),
        r"teacher name 'model' stands for something else",
    ),
    "teacher named dots": (tree(teachers=[{"model": "a/b", "name": ".."}]), r"and a letter or digit first"),
    "student in float16": (tree(student={"model": "a/b", "dtype": "float16"}), r"student.dtype"),
    "several GPUs for one worker": (tree(student={"model": "a/b", "gpus": 2}), r"student.gpus"),
    "unknown method in a section": (tree(stages=[{"method": "grpo"}]), r"stages.0: unknown method 'grpo'"),
    "method of another type": (tree(stages=[{"method": ["sft"]}]), r"stages.0: unknown method \['sft'\]"),
    "stage of another type": (tree(stages=[5]), r"stages.0: unknown method 5"),
    "stage without method": (
        tree(stages=[{"steps": 3}]),
        r"stages.0: method is missing; there are: sft, infifusion",
    ),
    "no stage": (tree(stages=[]), "stages is empty; name at least one"),
    "steps and epochs": (stage(steps=3, epochs=2), r"stages.0: give steps or epochs, not both \(steps=3, epochs=2.0\)"),
    "one teacher to merge": (
        tree(stages=["fusechat"], teachers=["some/teacher"]),
        r"stages.0 \(fusechat\) merges a student per teacher, and needs two teachers or more \(there is 1\)",
    ),
    "no teacher": (tree(teachers=[]), r"stages.0 \(infifusion\) needs at least one teacher"),
    "wrpo without preferences": (
        tree(stages=["wrpo"]),
        r"stages.0 \(wrpo\) needs `preferences`: rows of prompt, chosen, chosen_pivot, rejected",
    ),
    "fused wrpo without teachers": (
        tree(teachers=[], preferences="p.jsonl", stages=[{"method": "wrpo", "reference": "fused"}]),
        r"stages.0 \(wrpo\) needs at least one teacher",
    ),
    "a teacher per pair chosen by the mean": (
        tree(preferences="p.jsonl", stages=[{"method": "infifpo", "rule": "mean", "fuse_per": "pair"}]),
        r"stages.0: fuse_per: pair chooses a teacher, which rule 'mean' does not",
    ),
    "two teachers of one name": (tree(teachers=["a/same", "b/same/"]), "two teachers are called 'same'; give each"),
    "teacher name with a slash": (
        tree(teachers=[{"model": "a", "name": "x/y"}]),
        "teacher name 'x/y': use letters, digits",
    ),
    "teacher name that is a number": (tree(teachers=[{"model": "a", "name": 5}]), r"teachers.0.name: .*\(is 5\)"),
    "teacher name that is a list": (tree(teachers=[{"model": "a", "name": ["x"]}]), r"teacher name \['x'\]"),
    "batch is not whole units": (
        stage(batch_size=60),
        r"stages.0 \(infifusion\): batch_size 60 is not a multiple of data.unit_size 8",
    ),
    "units cannot be shared": (
        {**tree(), "student": {"model": "a", "workers": 3}},
        r"a step has 8 units .* which 3 workers cannot share equally",
    ),
    "k above signals.k": ({**stage(k=12), "signals": {"k": 10}}, r"stages.0 \(infifusion\): k 12 is more than"),
    "replicas": (
        tree(teachers=[{"model": "a", "replicas": {"min": 2, "max": 1}}]),
        r"replicas.min \(2\) is larger than replicas.max \(1\)",
    ),
    "remote code switched on": (
        tree(student={"model": "a/b", "trust_remote_code": True}),
        r"student.trust_remote_code: .*valid string \(is True\)",
    ),
    "remote code of another model": (
        tree(student={"model": "a/b", "trust_remote_code": "a/c"}),
        "must repeat the model's name 'a/b' .* but is 'a/c'",
    ),
    "output is a URL": (tree(output="s3://bucket/run"), "output: must be a folder, and 's3://bucket/run' is a URL"),
    "empty path": (tree(data=""), r"data.path: .*at least 1 character.*\(is ''\)"),
    "too long for a sample": (tree(data={"path": "a", "max_length": 4}), r"data.max_length: .*\(is 4\)"),
    "what to do with bad rows": (
        tree(data={"path": "a", "on_bad_row": "ignore"}),
        r"data.on_bad_row: .*'error' or 'skip' \(is 'ignore'\)",
    ),
    "score": (tree(evaluate={"path": "a", "score": "bleu"}), r"evaluate.score: .*\(is 'bleu'\)"),
    "a key that is no text": ({**tree(), 1: 2}, "1: Keys should be strings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_values_are_named(name):
    wrong, message = REFUSED[name]
    with pytest.raises(ConfigError) as raised:
        parse_config(wrong, "run.yaml")
    assert str(raised.value).startswith("run.yaml has 1 fault:\n  ")
    assert re.search(message, str(raised.value)), raised.value


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError) as raised:
        parse_config(tree(seed=-1, colour="blue", signals={"k": 0}), "run.yaml")
    lines = str(raised.value).splitlines()
    assert lines[0] == "run.yaml has 3 faults:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"seed", "colour", "signals.k"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"student: [a", "is not valid YAML"),
        (b"seed: 1\nstages: [sft]\nseed: 2\n", "is not valid YAML: the key 'seed' stands twice\n.* line 3"),
        (b"student: {model: a, model: b}", "is not valid YAML: the key 'model' stands twice"),
        (b"- student", "must hold keys and values .* not \\['student'\\]"),
        (b"", "must hold keys and values .* not None"),
        (b"\xff\xfe\x00", "cannot read the configuration"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere.yaml: .*No such file"):
        load_config(tmp_path / "nowhere.yaml")


# --- overrides ------------------------------


def test_overrides_reach_sections_lists_and_shorthand(minimal):
    config = load_config(
        minimal,
        [
            "seed=7",
            "student.dtype=bfloat16",
            "teachers.1.weight=0.5",
            "teachers.0.replicas.max=4",
            "data.limit=100",
            "stages.0.lam=0.1",
            "signals.store=s3://bucket/signals",
            "evaluate=held-out.jsonl",
            "evaluate.limit=20",
        ],
    )
    assert (config.seed, config.student.dtype, config.student.model) == (7, "bfloat16", "microsoft/phi-4")
    assert [teacher.weight for teacher in config.teachers] == [1.0, 0.5]
    assert config.teachers[0].replicas.max == 4
    assert config.teachers[0].model == "Qwen/Qwen2.5-14B-Instruct"
    assert (config.data.path, config.data.limit) == ("train.jsonl", 100)
    assert (config.stages[0].method, config.stages[0].lam) == ("infifusion", 0.1)
    assert config.store_url == "s3://bucket/signals"
    assert (config.evaluate.path, config.evaluate.limit) == ("held-out.jsonl", 20)


def test_overrides_replace_whole_lists_and_entries(minimal):
    config = load_config(minimal, ["teachers=[c/d]", "stages.0=sft", "data={path: other.parquet, limit: 3}"])
    assert [teacher.model for teacher in config.teachers] == ["c/d"]
    assert [item.method for item in config.stages] == ["sft"]
    assert (config.data.path, config.data.limit) == ("other.parquet", 3)


def test_an_override_is_checked_like_the_file(minimal):
    with pytest.raises(ConfigError, match=r"stages\.0\.lam: .*\(is 3\)"):
        load_config(minimal, ["stages.0.lam=3"])
    with pytest.raises(ConfigError, match=r"student\.speed: there is no such key"):
        load_config(minimal, ["student.speed=fast"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "is not of the form a.b=value"),
        ("=3", "is not of the form a.b=value"),
        ("data..limit=3", "is not of the form a.b=value"),
        ("output=[1", "the value is not valid YAML"),
        ("teachers.2=x", r"'2' is not one of the list's entries 0\.\.1"),
        ("teachers.-1=x", r"'-1' is not one of the list's entries"),
        ("teachers.²=x", r"'²' is not one of the list's entries"),
        ("teachers.first.dtype=float32", "'first' is not one of the list's entries"),
        ("seed.more.x=1", "seed is not a section"),
    ],
)
def test_overrides_that_lead_nowhere(override, message):
    with pytest.raises(ConfigError, match=message) as raised:
        apply_override(tree(seed=3), override)
    assert repr(override) in str(raised.value)


# --- the resolved configuration ------------------------------


def test_json_holds_every_field_and_parses_back(minimal):
    config = load_config(minimal, ["stages=[{method: sft, epochs: 3}, infifusion]", "evaluate=e.jsonl"])
    text = config_json(config)
    assert parse_config(json.loads(text)) == config
    resolved = json.loads(text)
    assert resolved["stages"][1]["lam"] == 0.03
    assert set(resolved["student"]) == set(type(config.student).model_fields)


@given(
    lam=st.floats(0, 1),
    rate=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63),
    model=st.text(min_size=1),
    epochs=st.none() | st.floats(1e-3, 1e3),
)
def test_json_keeps_every_bit(lam, rate, seed, model, epochs):
    wanted = stage(lam=lam, learning_rate=rate, epochs=epochs)
    config = parse_config({**wanted, "seed": seed, "student": {"model": model}})
    again = parse_config(json.loads(config_json(config)))
    assert again == config
    assert (again.stages[0].lam, again.stages[0].learning_rate, again.student.model) == (lam, rate, model)


def test_absolute_touches_local_paths_only(tmp_path, monkeypatch):
    for folder in ("pivot", "expert", "words"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = parse_config(
        {
            "student": {"model": "pivot", "trust_remote_code": "pivot", "tokenizer": "words"},
            "teachers": ["./expert", "Qwen/Qwen2.5-14B-Instruct"],
            "data": "train.jsonl",
            "stages": ["infifusion"],
            "output": "runs/new",
            "signals": {"store": "signals"},
            "evaluate": "hub/benchmark",
        }
    ).absolute()
    assert config.student.model == config.student.trust_remote_code == str(tmp_path / "pivot")
    assert config.student.tokenizer == str(tmp_path / "words")
    assert [teacher.model for teacher in config.teachers] == [str(tmp_path / "expert"), "Qwen/Qwen2.5-14B-Instruct"]
    assert [teacher.name for teacher in config.teachers] == ["expert", "Qwen2.5-14B-Instruct"]
    assert config.data.path == str(tmp_path / "train.jsonl")
    assert config.output == str(tmp_path / "runs/new")
    assert config.store_url == str(tmp_path / "signals")
    assert config.evaluate.path == "hub/benchmark"
    assert config.absolute() == config
    monkeypatch.chdir("/")
    assert config.absolute() == config


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pivot").mkdir()
    config = parse_config({**tree(student="~/pivot", teachers=["~missing/expert"]), "output": "~/run"}).absolute()
    assert config.student.model == str(tmp_path / "pivot")
    assert config.output == str(tmp_path / "run")


def test_absolute_leaves_urls():
    config = parse_config(tree(data="s3://bucket/train.jsonl", signals={"store": "memory://signals"})).absolute()
    assert config.data.path == "s3://bucket/train.jsonl"
    assert config.store_url == "memory://signals"


# --- what ships ------------------------------

PLAN = REPOSITORY / "jobs/compare.yaml"  # many runs, with a schema of its own
SHIPPED = sorted({*REPOSITORY.glob("jobs/**/*.yaml"), REPOSITORY / "rayfuse/quickstart/quickstart.yaml"} - {PLAN})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_shipped_run_loads(path, tmp_path):
    filled = tmp_path / "run.yaml"
    filled.write_text(path.read_text().replace("WORLD", "/world").replace("OUTPUT", "/run"))
    config = load_config(filled)
    assert config.stages
    assert parse_config(json.loads(config_json(config))) == config


def _sections_in(annotation):
    """The section classes that a type holds: itself, in a tuple, in a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}
    return {section for inner in typing.get_args(annotation) for section in _sections_in(inner)}


def test_every_field_is_described_and_every_section_has_a_docstring():
    pending, seen = [Config], set()
    while pending:
        section = pending.pop()
        seen.add(section.__name__)
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            inner = _sections_in(field.annotation)
            pending += inner
            # A field that holds a section is described by the section's docstring, and so is the name of a method.
            assert field.description or inner or name == "method", f"{section.__name__}.{name} has no description"
    assert seen >= {"Student", "Teacher", "Replicas", "Data", "Signals", "Benchmark", "Cluster"}
    assert seen >= {section.__name__ for section in STAGES.values()}


# --- command line ------------------------------


def test_config_and_cli_load_nothing_heavy():
    code = (
        "import sys, rayfuse.config, rayfuse.cli; "
        "print(sorted({'torch', 'ray', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command():
    done = subprocess.run([RAYFUSE, "--help"], capture_output=True, text=True, check=True)
    for command in ("check", "fuse", "quickstart", "inspect"):
        assert re.search(rf"\b{command}\b", done.stdout), command


def test_an_error_on_purpose_is_one_line_and_exit_status_1(tmp_path):
    missing = tmp_path / "a folder with a long name, longer than a terminal is wide, so that lines could be broken.yaml"
    done = subprocess.run([RAYFUSE, "check", str(missing)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"ConfigError: cannot read the configuration {missing}: [Errno 2] No such file or directory: '{missing}'"
    ]


def test_brackets_in_an_error_are_not_markup(minimal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rayfuse", "fuse", str(minimal), "seed=[red]"])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    assert "seed: Input should be a valid integer (is ['red'])" in capsys.readouterr().err


def test_other_errors_are_not_hidden(monkeypatch, minimal):
    def broken(path, overrides):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "load_config", broken)
    monkeypatch.setattr(sys, "argv", ["rayfuse", "fuse", str(minimal)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_every_kind_of_path_is_made_absolute_and_shown_without_its_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").touch()
    (tmp_path / "pivot").mkdir()
    config = parse_config(
        {
            "student": {"model": "pivot", "trust_remote_code": "pivot", "tokenizer": "pivot"},
            "teachers": ["some/teacher"],
            "data": "data/*.jsonl",
            "stages": ["sft"],
            "output": "run",
            "serving": {"http": {"certificate": "chain.pem", "certificate_key": "key.pem"}},
        }
    )
    absolute = config.absolute()
    assert absolute.student.model == absolute.student.trust_remote_code == str(tmp_path / "pivot")
    assert absolute.teachers[0].model == "some/teacher"
    assert absolute.data.path == str(tmp_path / "data" / "*.jsonl")
    assert absolute.serving.http.certificate == str(tmp_path / "chain.pem")
    shown = json.dumps(public_config(absolute))
    assert str(tmp_path) not in shown
    assert public_config(absolute)["student"]["tokenizer"] == "pivot"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prefer.judge.workers=2", {"method": "exact", "workers": 2}),
        ("preferences.limit=3", {"path": "pairs.jsonl", "limit": 3}),
        ("stages.0.steps=5", {"method": "sft", "steps": 5}),
        ("teachers.0.dtype=float32", {"model": "m", "dtype": "float32"}),
    ],
)
def test_an_override_opens_the_section_that_a_bare_text_stood_for(override, value):
    tree = {"teachers": ["m"], "stages": ["sft"], "preferences": "pairs.jsonl", "prefer": {"judge": "exact"}}
    apply_override(tree, override)
    node = tree
    for part in override.partition("=")[0].split(".")[:-1]:
        node = node[int(part)] if part.isdecimal() else node[part]
    assert node == value


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "strftime_now"])
def test_a_templates_arguments_are_not_the_conversation(name):
    with pytest.raises(ConfigError, match=rf"{name}: given by the data and the run; leave it out of `template`"):
        parse_config(tree(student={"model": "a/b", "template": {name: True}}))


def test_a_templates_arguments_are_plain_values_and_can_be_given_on_the_command_line():
    changed = tree(student={"model": "a/b"})
    apply_override(changed, "student.template.enable_thinking=false")
    student = parse_config(changed).student
    assert student.template == {"enable_thinking": False}
    assert hash(student) != hash(student.model_copy(update={"template": {}}))


def _weighted(stage, **changes):
    teachers = [{"model": "a/math", "weight": 2.0}, {"model": "a/code", "weight": 1.0}]
    return tree(stages=[stage], teachers=teachers, preferences="pairs.jsonl", **changes)


NO_PLACE = [
    {"method": "fusellm"},
    {"method": "fusechat"},
    {"method": "infifpo"},
    {"method": "infifpo", "fuse_per": "pair"},
    {"method": "wrpo", "reference": "fused"},
]


@pytest.mark.parametrize("given", NO_PLACE, ids=str)
def test_weights_that_a_method_would_ignore_are_refused_by_name(given):
    with pytest.raises(ConfigError, match=rf"\({given['method']}\): the teachers' weights \(math 2, code 1\)"):
        parse_config(_weighted(given))
    equal = _weighted(given)
    equal["teachers"][1]["weight"] = 2.0
    assert [teacher.weight for teacher in parse_config(equal).teachers] == [2.0, 2.0]


@pytest.mark.parametrize("method", [name for name in STAGES if name not in {"fusellm", "fusechat"}])
def test_weights_are_used_by_all_others(method):
    means = {"rule": "mean"} if method in {"infifpo", "wrpo"} else {}
    assert parse_config(_weighted({"method": method, **means})).stages[0].method == method


@pytest.mark.parametrize(
    "given", [{"k": 3}, {"standardized": False, "k": 2}, {"balance": 0.3}, {"betas": [0.8, 0.95]}], ids=str
)
def test_what_can_be_had_is_accepted_and_written_back(given):
    config = parse_config(stage(**given))
    assert parse_config(json.loads(config_json(config))) == config
    assert config.stages[0].model_dump(mode="json").items() >= given.items()


def test_what_a_newcomer_gets_is_in_the_measured_safe_range():
    """docs/methods.md: infifusion with 0.01 to 0.06 left the student as it was, 0.5 destroyed it."""
    (first,) = parse_config(tree()).stages
    assert first.method == "infifusion"
    assert 0.01 <= first.lam <= 0.05
    assert first.betas == (0.9, 0.999)  # those of torch, transformers and TRL
