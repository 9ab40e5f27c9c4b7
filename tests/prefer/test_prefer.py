"""`rayfuse prefer` from end to end on an embedded Ray: through the teachers' actors and a reward model's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rayfuse.config import Data, load_config, parse_config
from rayfuse.data.prompts import read_prompts
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.errors import ConfigError, DataError, ModelError
from rayfuse.evaluation.judges import JUDGES
from rayfuse.prefer.make import prefer, summary_path
from rayfuse.run.fuse import fuse
from rayfuse.teachers.identity import fingerprint

pytestmark = pytest.mark.ray

TRIPLE = ("chosen", "chosen_pivot", "rejected")


@pytest.fixture(scope="module")
def reward_model(tiny, tmp_path_factory):
    """A small reward model with random weights: its scores differ, which is all that is asked of it."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model("instruct"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tiny):
    """30 prompts without any response, one of them twice."""
    rows = [json.loads(line) for line in (tiny.root / "train.jsonl").read_text().splitlines()[::4]]
    path = tiny.root / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in [*rows, rows[0]]))
    assert len(rows) == 30
    return str(path)


def tree(tiny, folder, reward_model, prompts, **changes):
    """A configuration that makes triples, and stages that learn from them."""
    common = {"steps": 3, "batch_size": 16, "learning_rate": 1e-3}
    section = {
        "write": "triples",
        "prompts": {"path": prompts, "unit_size": 8, "max_length": 200},
        "judge": {"method": "reward_model", "model": reward_model, "dtype": "float32"},
        "per_teacher": 2,
        "from_pivot": 2,
        "max_new_tokens": 6,
        "replicas": {"idle_s": 5},
        **changes,
    }
    return tiny.tree(
        folder,
        preferences={"path": str(folder / "made.jsonl"), "unit_size": 8, "max_length": 200},
        prefer=section,
        stages=[{"method": "infifpo", **common}, {"method": "wrpo", "reference": "fused", **common}],
    )


@pytest.fixture(scope="module")
def made(tiny, reward_model, prompts, tmp_path_factory, embedded_ray):
    """The folder of a run that made triples."""
    folder = tmp_path_factory.mktemp("made")
    assert prefer(parse_config(tree(tiny, folder, reward_model, prompts))) == folder / "made.jsonl"
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "made.jsonl").read_text().splitlines()]


def test_rows_are_what_the_reward_model_says(made, tiny, reward_model, prompts):
    """Every row from the kept answers and the reward model alone, without Ray."""
    config = parse_config(tree(tiny, made, reward_model, prompts))
    judge = JUDGES["reward_model"](config.prefer.judge)
    answers = {}
    for path in (made / "answers").rglob("*.json"):
        content = json.loads(path.read_text())
        answers.setdefault(content["about"]["key"], {})[content["about"]["fingerprint"]] = content["answers"]
    asked, _ = read_prompts(Data(path=prompts))
    by_key = {prompt.sample.key: prompt for prompt in asked}
    assert set(answers) == set(by_key)
    prints = {fingerprint(teacher, config.signals.k): teacher.name for teacher in config.teachers}
    rows = rows_of(made)
    assert len(rows) > 10
    for row in rows:
        prompt = by_key[row["provenance"]["prompt"]]
        assert row["prompt"] == prompt.sample.messages[0].content
        texts = {"teachers": [], "pivot": []}
        for print_, given in answers[prompt.sample.key].items():
            assert len(given) == 2
            texts["teachers" if print_ in prints else "pivot"] += [text for text in given if text.strip()]
        scores = {text: judge([(prompt, text)])[0] for side in texts.values() for text in side}
        assert scores[row["chosen"]] == pytest.approx(max(scores[text] for text in texts["teachers"]), abs=1e-5)
        assert scores[row["chosen_pivot"]] == pytest.approx(max(scores[text] for text in texts["pivot"]), abs=1e-5)
        assert scores[row["rejected"]] == pytest.approx(min(scores.values()), abs=1e-5)
        for side in TRIPLE:
            source = row["provenance"][side]
            assert answers[prompt.sample.key][source["fingerprint"]][source["sample"]] == row[side]
            assert prints.get(source["fingerprint"], "pivot") == source["model"]
            assert source["score"] == pytest.approx(scores[row[side]], abs=1e-5)


def test_the_summary_adds_up(made):
    summary = json.loads(summary_path(made / "made.jsonl").read_text())
    rows, counts, models = rows_of(made), summary["counts"], summary["models"]
    assert summary["rows"] == len(rows)
    assert counts["rows read"] == 31
    assert counts["duplicate prompts"] == 1
    left_out = sum(count for name, count in counts.items() if name.startswith("prompts left out"))
    assert len(rows) + left_out == 30
    assert {name: of["responses"] for name, of in models.items()} == {"math": 60, "code": 60, "pivot": 60}
    assert all(of["different"] <= of["usable"] <= 60 for of in models.values())
    assert all(
        of["usable"] + sum(of.get(fault, 0) for fault in ("empty", "unreadable", "too long")) == 60
        for of in models.values()
    )
    for side in TRIPLE:
        assert sum(of.get(side, 0) for of in models.values()) == len(rows)
    assert models["math"].get("chosen_pivot", 0) == 0
    assert models["pivot"]["chosen_pivot"] == len(rows)


@pytest.mark.slow
def test_the_stages_read_the_rows(made, tiny, reward_model, prompts):
    """InfiFPO on chosen and rejected, then WRPO on all three, against the teachers through their actors."""
    config = parse_config(tree(tiny, made, reward_model, prompts))
    pairs, _ = read_preferences(config.preferences)
    triples, _ = read_preferences(config.preferences, TRIPLE)
    assert [(t[0], t[2]) for t in triples] == [tuple(pair) for pair in pairs]
    fuse(config)
    records = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["01-infifpo"] * 3 + ["02-wrpo"] * 3
    results = json.loads((made / "results.json").read_text())
    assert results["preferences"]["samples"] == results["triples"]["samples"] == len(pairs)
    # The second stage's teachers are asked for the pivot's responses only where the first has not: whole units, though.
    assert all(record["forwarded/math"] <= 48 for record in records)
    assert records[3]["stored/initial"] == 0
    assert "wrpo" in (made / "model" / "README.md").read_text()


def test_another_start_with_other_means_writes_the_same_bytes(made, tiny, reward_model, prompts, tmp_path):
    """Fewer units in flight, two judges, answers generated anew: nothing of that is in the result."""
    changed = tree(tiny, tmp_path, reward_model, prompts, in_flight=2)
    changed["prefer"]["judge"]["workers"] = 2
    prefer(parse_config(changed))
    assert (tmp_path / "made.jsonl").read_bytes() == (made / "made.jsonl").read_bytes()
    mine, theirs = (sorted(folder.rglob("answers/**/*.json")) for folder in (tmp_path, made))
    assert [path.read_bytes() for path in mine] == [path.read_bytes() for path in theirs]
    # Again, in the same folder: nothing is asked (no file changes), and the same is written.
    times = {path: path.stat().st_mtime_ns for path in mine}
    prefer(parse_config(changed))
    assert {path: path.stat().st_mtime_ns for path in mine} == times
    assert (tmp_path / "made.jsonl").read_bytes() == (made / "made.jsonl").read_bytes()
    # Other settings do not overwrite it.
    with pytest.raises(DataError, match=r"made.jsonl is there already, made with other settings"):
        prefer(parse_config({**changed, "prefer": {**changed["prefer"], "seed": 1}}))


def test_training_responses_without_a_judge(made, tiny, prompts, reward_model, tmp_path):
    """SeqKD: every response of every teacher, as rows that `data` reads; answers come from the first run's store."""
    config = tree(tiny, tmp_path, reward_model, prompts)
    config["prefer"] |= {
        "write": "responses",
        "judge": None,
        "from_pivot": None,
        "output": str(tmp_path / "train.jsonl"),
    }
    config["prefer"]["store"] = str(made / "answers")
    before = {path: path.stat().st_mtime_ns for path in (made / "answers").rglob("*.json")}
    prefer(parse_config(config))
    samples, _ = read_samples(Data(path=str(tmp_path / "train.jsonl")))
    assert 60 <= len(samples) <= 120
    assert {path: path.stat().st_mtime_ns for path in (made / "answers").rglob("*.json")} == before


def test_a_judge_that_cannot_start_ends_the_run_with_its_cause(made, tiny, prompts, tmp_path):
    config = tree(tiny, tmp_path, tiny.model("code"), prompts, store=str(made / "answers"))
    with pytest.raises(ModelError, match="is no reward model"):
        prefer(parse_config(config))
    assert not (tmp_path / "made.jsonl").exists()


def test_a_judge_that_agrees_with_nothing_gives_no_file(made, tiny, tmp_path):
    """Untrained models answer nothing right: that is an error that says so."""
    config = tree(tiny, tmp_path, "", str(tiny.root / "eval.jsonl"), judge="exact")
    with pytest.raises(DataError, match="no prompt gives a row"):
        prefer(parse_config(config))
    assert not (tmp_path / "made.jsonl").exists()


# --- configuration ------------------------------


def faulty(tiny, tmp_path, message, **changes):
    with pytest.raises(ConfigError, match=message):
        parse_config(tree(tiny, tmp_path, "r", "p.jsonl", **changes))


def test_faulty_sections_are_refused(tiny, tmp_path):
    faulty(tiny, tmp_path, "needs a `judge` to tell better from worse", judge=None)
    faulty(tiny, tmp_path, r"unknown method 'best' of a judge; there are: reward_model, exact", judge="best")
    faulty(tiny, tmp_path, r"prefer.judge.*model: is missing", judge="reward_model")
    faulty(tiny, tmp_path, "triples needs responses of the teachers and of the pivot", from_pivot=0)
    faulty(tiny, tmp_path, "from_pivot 3 has no use", write="responses", from_pivot=3)
    faulty(tiny, tmp_path, "at temperature 0", temperature=0)
    faulty(tiny, tmp_path, "output must be a .jsonl file", output="s3://bucket/made.jsonl")
    faulty(tiny, tmp_path, "needs at least two responses", write="preferences", per_teacher=0, from_pivot=1)
    without = tree(tiny, tmp_path, "r", "p.jsonl")
    del without["preferences"]
    without["stages"] = ["sft"]
    with pytest.raises(ConfigError, match=r"prefer.output is missing"):
        parse_config(without)


def test_short_forms_and_overrides(tiny, tmp_path):
    config = tree(tiny, tmp_path, "r", "p.jsonl", judge="exact")
    config["prefer"]["prompts"] = "p.jsonl"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    loaded = load_config(path, ["prefer.judge.workers=3", "prefer.prompts.limit=5", "prefer.seed=2"])
    assert (loaded.prefer.judge.method, loaded.prefer.judge.workers) == ("exact", 3)
    assert (loaded.prefer.prompts.path, loaded.prefer.prompts.limit, loaded.prefer.seed) == ("p.jsonl", 5, 2)
    assert loaded.prefer_output == str(tmp_path / "made.jsonl")


# --- interruption ------------------------------


@pytest.mark.chaos
def test_a_killed_run_goes_on_and_writes_the_same_bytes(made, tiny, reward_model, prompts, tmp_path):
    """SIGKILL with some answers written; the next start keeps them and ends with the bytes of an undisturbed run."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(tiny, tmp_path, reward_model, prompts, in_flight=1)))
    command = [str(Path(sys.executable).with_name("rayfuse")), "prefer", str(config)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 500
    while len(list(tmp_path.rglob("answers/**/*.json"))) < 20:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "made.jsonl").exists()
    time.sleep(3)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("answers/**/*.json")}
    assert 20 <= len(kept) < 90
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert output.returncode == 0, output.stdout + output.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(tmp_path.rglob("answers/**/*.json"))) == 90
    assert (tmp_path / "made.jsonl").read_bytes() == (made / "made.jsonl").read_bytes()
    assert "rows of triples" in output.stdout
