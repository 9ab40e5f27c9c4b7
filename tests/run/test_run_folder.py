"""A run folder: which changes of a configuration a resumed run may have, and damaged files of it."""

import json

import pytest

from rayfuse.config import parse_config
from rayfuse.errors import CheckpointError
from rayfuse.run.folder import Stopwatch, open_run_folder


def _config(output, **changes):
    tree = {
        "student": {"model": "org/student"},
        "teachers": [{"model": "org/math", "name": "math"}, {"model": "served", "name": "far", **SERVER}],
        "data": {"path": "train.jsonl"},
        "preferences": {"path": "pairs.jsonl"},
        "stages": ["sft", {"method": "infifusion", "merge": "sce"}, "dpo"],
        "output": str(output),
    }
    for key, value in changes.items():
        node = tree
        *path, last = key.split("__")
        for part in path:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
            assert not isinstance(node, str)
        node[last] = value
    return parse_config(tree)


SERVER = {"backend": "openai", "tokenizer": "org/tokenizer", "endpoint": {"url": "https://server.example"}}


@pytest.fixture
def begun(tmp_path):
    """A run folder in which a stage has begun."""
    open_run_folder(_config(tmp_path), resume=False)
    (tmp_path / "stages").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teachers__0__patience_s", 7.0),
        ("teachers__0__replicas", {"min": 1, "max": 3}),
        ("teachers__0__unit_timeout_s", 9.0),
        ("teachers__0__parity", False),
        ("teachers__1__endpoint__max_wait_s", 9.0),
        ("teachers__1__endpoint__api_key_env", "KEY"),
        ("student__max_failures", 9),
        ("student__prefetch", 9),
        ("student__save_dtype", "bfloat16"),
        ("student__engine", "torch"),
        ("stages__1__save_every", 3),
        ("stages__1__keep", 9),
        ("stages__1__merge", {"method": "sce", "parallel": 2}),
        ("serving__mode", "first"),
        ("serving__max_dropped", 0.5),
        ("serving__http", True),
        ("cluster__address", "local"),
        ("student__workers", 2),
        ("evaluate", "eval.jsonl"),
        ("prefer", {"write": "responses", "output": "made.jsonl"}),
    ],
)
def test_what_does_not_change_the_result_may_change(begun, key, value):
    if key.startswith("stages"):
        tree = ["sft", {"method": "infifusion", "merge": "sce"}, "dpo"]
        tree[1] = {**tree[1], key.split("__")[2]: value}
        key, value = "stages", tree
    changed = _config(begun, **{key: value})
    open_run_folder(changed, resume=True)
    assert json.loads((begun / "config.json").read_text()) == changed.model_dump(mode="json")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", 3, "seed was 0 and is 3"),
        ("serving__on_missing", "wait", 'serving.on_missing was "fail" and is "wait"'),
        ("student__dtype", "bfloat16", 'student.dtype was "float32" and is "bfloat16"'),
        ("student__router_loss", 0.0, "student.router_loss was null and is 0.0"),
        ("data__path", "other.jsonl", 'data.path was "train.jsonl" and is "other.jsonl"'),
        ("teachers__0__weight", 2.0, "teachers.0.weight was 1.0 and is 2.0"),
        ("signals__k", 12, "signals.k was 10 and is 12"),
    ],
)
def test_what_changes_the_result_is_refused_by_its_key(begun, key, value, said):
    before = (begun / "config.json").read_bytes()
    with pytest.raises(CheckpointError) as error:
        open_run_folder(_config(begun, **{key: value}), resume=True)
    assert f"({said})" in str(error.value)
    assert (begun / "config.json").read_bytes() == before


def test_another_engine_is_refused_and_another_number_of_workers_is_not(begun):
    with pytest.raises(CheckpointError, match=r'\(student.engine was "ddp" and is "fsdp2"\)'):
        open_run_folder(_config(begun, student__engine="fsdp2", student__workers=2), resume=True)


def test_a_stage_that_came_is_refused(begun):
    with pytest.raises(CheckpointError, match=r"stages\.3\.\w+ was not there and is"):
        open_run_folder(_config(begun, stages=["sft", {"method": "infifusion", "merge": "sce"}, "dpo", "sft"]), True)


def test_a_run_whose_folder_was_moved_continues(begun, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "run"
    begun.rename(moved)
    open_run_folder(_config(moved), resume=True)


def test_keys_that_are_newer_than_the_run_have_their_defaults(begun):
    """A configuration of an older version lacks them, and is the same run."""
    tree = json.loads((begun / "config.json").read_text())
    del tree["student"]["save_dtype"], tree["student"]["router_loss"], tree["teachers"][0]["autocast"]
    tree["student"]["engine"] = "torch"
    (begun / "config.json").write_text(json.dumps(tree))
    open_run_folder(_config(begun), resume=True)


@pytest.mark.parametrize("content", ["", '{"student": {', "[1]", '{"student": 3}'])
def test_a_torn_configuration_is_an_error_of_ours(begun, content):
    (begun / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged, or of another version"):
        open_run_folder(_config(begun), resume=True)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b'{"a": "b"}', b"\xff"])
def test_torn_times_cost_the_times_and_not_the_run(tmp_path, content, caplog):
    path = tmp_path / "times.json"
    path.write_bytes(content)
    timed = Stopwatch(path)
    assert "times.json is damaged" in caplog.text
    with timed("part"):
        pass
    assert list(json.loads(path.read_text())) == ["part"]


def test_the_times_of_a_resumed_run_add_up(tmp_path):
    (tmp_path / "times.json").write_text('{"part": 5.0}')
    timed = Stopwatch(tmp_path / "times.json")
    with timed("part"):
        pass
    assert timed.seconds["part"] >= 5
