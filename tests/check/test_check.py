"""`rayfuse check`: each fault is named with its key and its value, and a check leaves nothing behind."""

import io
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rayfuse.check import check_config
from rayfuse.cli import app
from rayfuse.config import load_config
from rayfuse.errors import ConfigError

GIGABYTE = 2**30
FINGERPRINT = "0" * 32


@pytest.fixture(autouse=True)
def embedded(monkeypatch):
    """Checks are of an embedded run, whatever the cluster of whoever runs the tests."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def world(tiny, tmp_path):
    """Called with changes to the tiny run, this writes its YAML file; `world.tiny` and `world.folder` are at hand."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny.tree(tmp_path / "run", **changes)), encoding="utf-8")
        return path

    write.tiny, write.folder = tiny, tmp_path
    return write


def findings(path, *overrides):
    """(faults as "where: text", everything printed)."""
    output = io.StringIO()
    faults = check_config(load_config(path, overrides), Console(file=output, width=120))
    return [f"{fault.where}: {fault.text}" for fault in faults], output.getvalue()


def everything_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


# --- nothing is wrong ------------------------------


def test_a_good_run_has_no_fault_and_leaves_nothing_behind(world):
    path = world(evaluate={"path": str(world.tiny.root / "eval.jsonl"), "max_new_tokens": 8})
    deep = world.folder / "some" / "deep" / "run"
    before = everything_below(world.folder) + everything_below(world.tiny.root)
    faults, printed = findings(path, f"output={deep}")
    assert faults == []
    assert [line.split()[0] for line in printed.splitlines()] == ["read", "read", "read", "read", "remark", "ok"]
    assert "evaluate.path: 24 of the first 120 training samples are also evaluation items" in printed
    assert "nothing stands in the way of this run" in printed
    assert everything_below(world.folder) + everything_below(world.tiny.root) == before


def test_a_check_of_a_finished_run_keeps_its_files(world):
    run = world.folder / "run"
    (run / "signals" / FINGERPRINT).mkdir(parents=True)
    (run / "config.json").write_text("{}")
    path = world()
    before = everything_below(world.folder)
    faults, printed = findings(path)
    assert faults == []
    assert "already holds a run; go on with --resume, or use another folder" in printed
    assert everything_below(world.folder) == before


def test_a_check_that_finds_faults_leaves_nothing_behind_either(world):
    path = world(data={"path": "/missing.jsonl", "max_length": 200}, teachers=["/missing"])
    before = everything_below(world.folder)
    assert len(findings(path)[0]) == 2
    assert everything_below(world.folder) == before


def test_the_command_exits_with_status_1_and_prints_every_fault(world):
    done = CliRunner().invoke(app, ["check", str(world()), "student=/missing/model", "data.path=/missing.jsonl"])
    assert done.exit_code == 1
    assert "fault  student: the folder /missing/model does not exist" in done.output
    assert "fault  data: cannot read the data set /missing.jsonl" in done.output
    assert CliRunner().invoke(app, ["check", str(world())]).exit_code == 0


# --- faults that the file itself shows ------------------------------

IN_THE_FILE = {
    "unknown key": (["student.speed=fast"], r"student\.speed: there is no such key"),
    "unknown method": (
        ["stages.0={method: distill}"],
        "stages.0: unknown method 'distill'; there are: sft, infifusion",
    ),
    "two teachers of one name": (["teachers=[a/x, b/x]"], "two teachers are called 'x'"),
    "batch_size is not a multiple": (["stages.0.batch_size=12"], "batch_size 12 is not a multiple of data.unit_size 8"),
    "units cannot be shared by the workers": (["student.workers=3"], "a step has 2 units .* which 3 workers cannot"),
    "k above signals.k": (["stages.0.k=9"], "k 9 is more than signals.k 5"),
    "no teacher": (["teachers=[]"], "infifusion. needs at least one teacher"),
    "output is a URL": (["output=s3://bucket/run"], "output: must be a folder, and 's3://bucket/run' is a URL"),
    "out of range": (["stages.0.lam=2"], r"stages\.0\.lam: .*\(is 2\)"),
    "no number": (["stages.0.learning_rate=fast"], r"stages\.0\.learning_rate: .*\(is 'fast'\)"),
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_faults_in_the_file(world, name):
    overrides, message = IN_THE_FILE[name]
    with pytest.raises(ConfigError, match=message):
        load_config(world(), overrides)


# --- faults of the machine ------------------------------


def only(faults, where, message):
    """Exactly one fault, at this key, that says this."""
    assert len(faults) == 1, faults
    assert re.search(rf"^{where}: {message}", faults[0], re.DOTALL), faults[0]


def test_output_is_a_file(world):
    path = world()
    (world.folder / "run").touch()
    faults, _ = findings(path, "teachers=[]", "stages=[sft]")
    only(faults, "output", f"{world.folder}/run is a file, so {world.folder}/run cannot be made")


def test_output_below_a_file(world):
    path = world()
    (world.folder / "file").touch()
    faults, _ = findings(path, f"output={world.folder}/file/run", "signals.store=memory://check")
    only(faults, "output", f"{world.folder}/file is a file, so {world.folder}/file/run cannot be made; use another")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root cannot write")
def test_output_is_not_writable(world):
    faults, _ = findings(world(), "output=/proc/run", "signals.store=memory://check")
    only(faults, "output", "/proc is not writable: ")


def test_disk_is_too_small(world, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIGABYTE, GIGABYTE, 1000))
    faults, _ = findings(world())
    only(
        faults, "output", rf"models and checkpoints need about 0.0 GiB, but {world.folder} has 0.0 GiB free; free some"
    )


def test_disk_need_counts_models_and_checkpoints(world, monkeypatch):
    pivot = load_file(Path(world.tiny.model("pivot")) / "model.safetensors")
    weights = 4 * sum(value.numel() for value in pivot.values())
    usage = namedtuple("usage", "total used free")
    # A model of each of two stages; the second has three checkpoints of weights and two moments, and the fused model.
    needed = weights + weights * (1 + 3 * 3) + weights
    stages = "stages=[{method: sft, steps: 4}, {method: sft, steps: 400, save_every: 100, keep: 2}]"
    for free, expected in ((needed - 1, 1), (needed, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        assert len(findings(world(), stages)[0]) == expected


def test_store_below_a_file(world):
    path = world()
    (world.folder / "file").touch()
    faults, _ = findings(path, f"signals.store={world.folder}/file/signals")
    only(faults, "signals.store", f"the signal store {world.folder}/file/signals is not writable: ")


def test_store_of_an_unknown_kind(world):
    faults, _ = findings(world(), "signals.store=nowhere://signals")
    only(faults, "signals.store", "the signal store nowhere://signals cannot be opened: Protocol not known: nowhere")


@pytest.mark.parametrize(
    ("overrides", "there", "where", "wanted"),
    [
        (["student.gpus=1"], 0, "student.gpus", "1 GPUs are asked for, but this machine has 0"),
        (["student.gpus=1", "student.workers=2"], 1, "student.gpus", "2 GPUs are asked for, but this machine has 1"),
        (["teachers.1.gpus=1"], 0, r"teachers\.1\.gpus", "1 GPUs are asked for, but this machine has 0"),
        (
            ["student.gpus=1", "teachers.0.gpus=0.5", "teachers.1.gpus=1"],
            2,
            r"student\.gpus, teachers\.N\.gpus",
            "2.5 GPUs are asked for, but this machine has 2",
        ),
    ],
)
def test_more_gpus_than_there_are(world, monkeypatch, overrides, there, where, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    faults, _ = findings(world(), *overrides)
    only(faults, where, f"{wanted}; lower it, or use a cluster")


def test_gpus_of_a_cluster_are_not_of_this_machine(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert findings(world(), "student.gpus=1", "cluster.address=ray://head:10001")[0] == []
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert findings(world(), "student.gpus=1")[0] == []
    assert len(findings(world(), "student.gpus=1", "cluster.address=local")[0]) == 1


# --- faults of the models ------------------------------


def copy_of(world, name):
    """A copy of one of the tiny models, to be broken."""
    return Path(shutil.copytree(world.tiny.model(name), world.folder / f"broken-{name}"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_tokenizer(folder, backend, **names):
    for old in folder.glob("*token*"):
        old.unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def remove_folder(folder):
    shutil.rmtree(folder)


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def grow_tokenizer(folder):
    """One more piece in the vocabulary that the tokenizer was made with."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    largest = max([*tree["model"]["vocab"].values(), *(token["id"] for token in tree["added_tokens"])])
    tree["model"]["vocab"]["zzzz"] = largest + 1
    path.write_text(json.dumps(tree))


def break_config(folder):
    (folder / "config.json").write_text("{")


def remove_config(folder):
    (folder / "config.json").unlink()


def not_causal(folder):
    """An encoder in the place of a language model (its tokenizer stays)."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    small = BertConfig(vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for old in (folder / "model.safetensors", folder / "config.json"):
        old.unlink()
    BertModel(small).save_pretrained(folder)
    edit_json(folder / "config.json", model_type="vit", image_size=8)


def short_context(folder):
    edit_json(folder / "config.json", max_position_embeddings=150)


def wordpiece(folder):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        ["the answer is 4"], trainers.WordPieceTrainer(special_tokens=["[UNK]", "</s>"], show_progress=False)
    )
    replace_tokenizer(folder, backend, eos_token="</s>")


def lower_casing(folder):
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    replace_tokenizer(folder, backend, eos_token="<|end|>")


def no_end_of_turn(folder):
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    (folder / "chat_template.jinja").unlink()
    replace_tokenizer(folder, backend)


def broken_template(folder):
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")


MODEL_FAULTS = {
    "missing folder": (remove_folder, "the folder .*/broken-math does not exist"),
    "no weights": (remove_weights, r".*/broken-math has no \*\.safetensors \(it has: .*config.json"),
    "pickled weights only": (
        pickle_weights,
        r".*/broken-math has no \*\.safetensors \(it has: .*pytorch_model.bin.*pickled weights are refused",
    ),
    "no tokenizer": (remove_tokenizer, "cannot load the tokenizer of .*/broken-math: "),
    "broken tokenizer": (break_tokenizer, "cannot load the tokenizer of .*/broken-math: "),
    "tokenizer bigger than the model": (
        grow_tokenizer,
        r"the tokenizer has (\d+) tokens but the model predicts only \d+: they do not belong together",
    ),
    "broken configuration": (break_config, "cannot load the .* of .*/broken-math: "),
    "no configuration": (remove_config, "cannot load the .* of .*/broken-math: "),
    "not a causal language model": (not_causal, r".*/broken-math \(vit\) is not a causal language model"),
    "WordPiece": (wordpiece, r"the tokens of tokenizer .*\(WordPiece with \['##'\]\) do not tell their bytes"),
    "lower-casing tokenizer": (
        lower_casing,
        "the normalizer Lowercase of tokenizer .*/broken-math.* rewrites the text",
    ),
    "no token ends a turn": (no_end_of_turn, ".*/broken-math has no end-of-turn token: .* set one in tokenizer_config"),
    "template that is no template": (broken_template, "the chat template cannot be used: .*/broken-math"),
}


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_faults_of_a_teacher(world, name):
    spoil, message = MODEL_FAULTS[name]
    folder = copy_of(world, "math")
    spoil(folder)
    faults, printed = findings(world(), f"teachers.0.model={folder}")
    named = [fault for fault in faults if re.search(rf"^teachers\.0 \(broken-math\): {message}", fault, re.DOTALL)]
    assert len(named) == 1, faults
    assert "Traceback" not in printed
    assert all(fault.startswith(("teachers.0", "data: ")) for fault in faults)


@pytest.mark.parametrize("name", ["missing folder", "pickled weights only", "tokenizer bigger than the model"])
def test_faults_of_the_student(world, name):
    spoil, message = MODEL_FAULTS[name]
    folder = copy_of(world, "math")
    spoil(folder)
    faults, _ = findings(world(), f"student.model={folder}")
    only(faults, "student", message)


def test_missing_folders_below_the_working_folder(world, monkeypatch):
    monkeypatch.chdir(world.folder)
    only(findings(world(), "student=./nowhere")[0], "student", r"the folder \./nowhere does not exist")


def test_missing_tokenizer_folder(world):
    faults, _ = findings(world(), "teachers.1.tokenizer=/missing/words")
    only(faults, r"teachers\.1 \(code\)", "the tokenizer's folder /missing/words does not exist")


def test_missing_gguf_file(world):
    faults, _ = findings(world(), "teachers.0.gguf_file=weights.gguf")
    only(faults, r"teachers\.0 \(math\)", f"{world.tiny.model('math')} has no file weights.gguf")


def test_k_above_a_vocabulary(world):
    sizes = {
        name: json.loads((Path(world.tiny.model(name)) / "config.json").read_text())["vocab_size"] for name in NAMES
    }
    k = min(sizes.values()) + 1
    faults, _ = findings(world(), f"signals.k={k}")
    (small,) = [name for name, size in sizes.items() if size < k]
    where = {"pivot": "student", "math": r"teachers\.0 \(math\)", "code": r"teachers\.1 \(code\)"}[small]
    only(faults, where, f"signals.k is {k}, but this model has only {k - 1} tokens")


NAMES = ("math", "code", "pivot")


def test_max_length_above_the_context(world):
    folder = copy_of(world, "pivot")
    short_context(folder)
    faults, _ = findings(world(), f"student.model={folder}")
    only(faults, r"data\.max_length", "200 is more than the student's context of 150")


def test_a_model_without_template_is_a_remark(world):
    folder = copy_of(world, "math")
    (folder / "chat_template.jinja").unlink()
    faults, printed = findings(world(), f"teachers.0.model={folder}")
    assert faults == []
    assert "remark teachers.0 (broken-math): has no chat template; prompts are rendered as plain text" in printed


# --- faults of the data ------------------------------


def rows(world, *lines):
    """A data file: two good rows, then these lines."""
    path = world.folder / "rows.jsonl"
    good = json.dumps({"prompt": "a", "response": "b"})
    path.write_text("\n".join([good, good, *(line if isinstance(line, str) else json.dumps(line) for line in lines)]))
    return path


BAD_ROWS = {
    "no JSON": ("{prompt: a}", "not valid JSON in UTF-8"),
    "no object": (["a"], "a row must be an object with keys, not list"),
    "missing columns": ({"ask": "a", "say": "b"}, r"a row needs .*; it has \['ask', 'say'\]"),
    "empty response": ({"prompt": "a", "response": ""}, "'response' is empty"),
    "response is no text": ({"prompt": "a", "response": 4}, "'response' must be text, not int"),
    "prompt is no text": ({"prompt": 4, "response": "a"}, "'prompt' must be a non-empty list of messages, not 4"),
    "half a character": (r'{"prompt": "a", "response": "\ud83d"}', "'response' is not valid Unicode"),
    "no message": ({"messages": []}, "'messages' must be a non-empty list"),
    "unknown role": ({"messages": [{"role": "bot", "content": "a"}]}, r"messages\[0\]: role 'bot' is none of system"),
    "content is no text": ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: content must be text"),
    "no assistant turn": ({"messages": [{"role": "user", "content": "a"}]}, "'messages' has no assistant turn"),
    "skill is no text": ({"prompt": "a", "response": "b", "skill": 1}, "'skill' must be text, not int"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_malformed_rows(world, name):
    line, reason = BAD_ROWS[name]
    path = rows(world, line)
    faults, _ = findings(world(), f"data.path={path}")
    only(faults, "data", f"{path}:3: .*{reason}.* set data.on_bad_row: skip")
    faults, printed = findings(world(), f"data.path={path}", "data.on_bad_row=skip")
    assert faults == []
    assert f"remark data: 1 of the first 3 rows are malformed: {path}:3: " in printed


def test_a_malformed_row_far_down_is_named_under_data(world):
    path = rows(world, *[{"prompt": str(i), "response": "b"} for i in range(200)], {"prompt": "a"})
    faults, _ = findings(world(), f"data.path={path}", f"evaluate={world.tiny.root}/eval.jsonl")
    only(faults, "data", f"{path}:203: a row needs")


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "missing"])
def test_missing_data(world, name):
    path = world.folder / name
    faults, _ = findings(world(), f"data.path={path}")
    only(faults, "data", f"cannot read the data set {path}: ")


def test_empty_data(world):
    path = world.folder / "empty.jsonl"
    path.touch()
    only(findings(world(), f"data.path={path}")[0], "data", f"the data set {path} gives no sample: it has no rows")


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_all_samples_are_too_long(world, too_long):
    path = world.folder / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a " * 50, "response": "b " * 50}))
    faults, _ = findings(world(), f"data.path={path}", "data.max_length=20", f"data.too_long={too_long}")
    only(faults, r"data\.max_length", r"all of the first 1 samples are longer than 20 student tokens \(the longest has")
    assert ("or set data.too_long: cut" in faults[0]) == (too_long == "drop")


def test_some_samples_that_are_too_long_are_a_remark(world):
    path = rows(world, {"prompt": "a " * 100, "response": "b"})
    faults, printed = findings(world(), f"data.path={path}", "data.max_length=60")
    assert faults == []
    assert "remark data.max_length: 1 of the first 3 samples are longer than 60 student tokens" in printed
    assert "data.max_length" not in findings(world(), f"data.path={path}", "data.max_length=60", "data.too_long=cut")[1]


@pytest.mark.parametrize("who", ["student.model", "teachers.1.model"])
def test_a_template_that_refuses_the_roles_of_the_data(world, who):
    folder = copy_of(world, "code")
    template = folder / "chat_template.jinja"
    refuse = "{% for m in messages if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endfor %}"
    template.write_text(refuse + template.read_text())
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    path = rows(world, {"messages": chat})
    overrides = (f"data.path={path}", f"{who}={folder}")
    faults, _ = findings(world(), *overrides)
    only(
        faults,
        "data",
        "1 of the first 3 samples cannot be read by every model, the first: sample .*'assistant'.*: the chat template "
        rf"of {folder} refuses a conversation with the roles \[system, user\]: no system role",
    )
    faults, printed = findings(world(), *overrides, "data.on_bad_row=skip")
    assert faults == []
    assert "remark data: 1 of the first 3 samples cannot be read by every model" in printed


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_a_response_longer_than_a_teachers_context_is_left_out_and_counted(world, too_long):
    folder = copy_of(world, "math")
    edit_json(folder / "config.json", max_position_embeddings=16)
    path = rows(world, {"prompt": "a", "response": "1 " * 40})
    faults, printed = findings(
        world(), f"data.path={path}", f"teachers.0.model={folder}", f"data.too_long={too_long}", "evaluate=null"
    )
    assert faults == []
    assert "remark data.too_long: 1 of the first 3 samples are longer than the context of broken-math" in printed


# --- what is read ------------------------------


def test_the_form_of_each_data_set_is_shown_and_a_sample_as_each_model_reads_it(world):
    one = world.folder / "one.csv"
    one.write_text("question,answer,source\nTwo and two?,4,x\n")
    call = {"name": "add", "arguments": {"a": 2}}
    chat = [
        {"role": "user", "content": "a", "id": 1},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c"},
    ]
    two = rows(world, {"messages": chat})
    sources = [str(one), {"path": str(two), "weight": 2}]
    path = world(data={"sources": sources, "max_length": 200})
    faults, printed = findings(path)
    assert not [fault for fault in faults if not fault.startswith("data: ")]
    assert f"read   data: {one}: rows read: 1 as 'question' + 'answer'; not read: source\n" in printed
    assert (
        f"read   data: {two}, weight 2: rows read: 2 as 'prompt' + 'response', 1 as messages (role, content) in "
        "'messages'; not read: id (of messages); 1 turns that call tools are context, not learned; 1 turns are marked "
        "as context, not learned\n"
    ) in printed
    shown = [line for line in printed.splitlines() if " => " in line]
    assert [line.split("(")[1].split(")")[0] for line in shown] == ["student", "math", "code"]
    for line, end in zip(shown, ("<|over|>", "<|end|>", "<|im_end|>"), strict=True):
        assert "Two and two?" in line
        assert line.endswith(f"=> '4{end}'")


def test_the_pairs_that_are_read_are_shown(world):
    pair = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}] for answer in "45"]
    path = world.folder / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": pair[0], "rejected": pair[1], "score_chosen": 9}))
    preferences = {"path": str(path), "max_length": 200}
    stage = {"method": "dpo", "steps": 1, "batch_size": 8}
    faults, printed = findings(world(preferences=preferences, stages=[stage]))
    assert faults == []
    assert f"read   preferences: {path}: rows read: 1 as 'chosen' and 'rejected'; not read: score_chosen\n" in printed


# --- faults of the evaluation ------------------------------


def test_missing_evaluation_items(world):
    faults, _ = findings(world(), "evaluate=/missing/eval.jsonl")
    only(faults, "evaluate", "cannot read the data set /missing/eval.jsonl: ")


def test_malformed_evaluation_items(world):
    path = rows(world, {"prompt": "a"})
    only(findings(world(), f"evaluate={path}")[0], "evaluate", f"{path}:3: a row needs 'messages', or 'prompt'")


def test_an_evaluation_item_that_a_model_cannot_read(world):
    folder = copy_of(world, "math")
    edit_json(folder / "config.json", max_position_embeddings=150)
    path = world.folder / "eval.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "1 " * 400}))
    overrides = (f"evaluate={path}", f"teachers.0.model={folder}")
    faults, _ = findings(world(), *overrides)
    only(faults, r"evaluate\.path", r"a model cannot read an item: sample .*: the response is longer than .* broken-m")
    assert findings(world(), *overrides, "evaluate.teachers=false")[0] == []


# --- the student's engine ------------------------------


def test_an_engine_that_is_not_installed(world, monkeypatch):
    monkeypatch.setattr("rayfuse.check.machine.find_spec", lambda module: None)
    faults, _ = findings(world(), "student.engine=deepspeed", "student.workers=2")
    only(faults, "student.engine", "deepspeed needs the Python package deepspeed, which is not installed; or use fsdp2")


def test_an_attention_that_is_not_installed_and_does_not_fit(world, monkeypatch):
    monkeypatch.setattr("rayfuse.check.machine.find_spec", lambda module: None)
    faults, _ = findings(world(), "student.attention=flash_attention_2")
    assert faults == [
        "student.attention: flash_attention_2 needs the Python package flash_attn, which is not installed; or use sdpa",
        "student.attention: flash_attention_2 computes in bfloat16 on a GPU; set both, or use sdpa",
    ]


def test_a_zero_stage_with_one_worker(world):
    with pytest.raises(ConfigError, match="deepspeed shares the model out over its workers, and there is 1"):
        findings(world(), "student.engine=deepspeed", "student.zero_stage=3")


def test_checkpoints_of_another_engine(world):
    run = world.folder / "run"
    (run / "stages/01-infifusion/checkpoints/step_2").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"student": {"engine": "ddp"}}))
    faults, _ = findings(world(), "student.engine=fsdp2", "student.workers=2")
    only(
        faults,
        "student.engine",
        ".*/run holds checkpoints of the engine ddp, which fsdp2 cannot read: use engine: ddp, or",
    )
    assert findings(world())[0] == []
