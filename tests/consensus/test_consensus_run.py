"""`recipe: experts` from end to end on an embedded Ray: asked through replicas, decided, written, learnt, resumed."""

import json
from html import escape
from random import Random

import pytest
from rich.console import Console

from rayfuse.check.data import check_data
from rayfuse.config import parse_config
from rayfuse.consensus.inspection import labels_table
from rayfuse.consensus.make import summary
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.errors import ConfigError, DataError
from rayfuse.quickstart import facts, tiny_models
from rayfuse.run.fuse import fuse

pytestmark = pytest.mark.ray

FIELDS = {"math": "towns", "code": "pets"}


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """Two experts that know 40 facts of one field each, a pivot that knows few of both, and data with wrong labels."""
    root = tmp_path_factory.mktemp("knowing")
    world = [fact for field in FIELDS.values() for fact in [f for f in facts.facts(0) if f.field == field][:40]]
    rows = facts.rows(world, "train")
    for seed, name in enumerate((*FIELDS, "pivot")):
        shares = {field: 1.0 if FIELDS.get(name) == field else 0.2 for field in facts.FIELDS}
        taught = facts.known(world, shares, seed)
        tokenizer = tiny_models.make_tokenizer(
            tiny_models.STYLES[name], [f"{row['prompt']} {row['response']}" for row in rows]
        )
        model = tiny_models.make_model(tokenizer, seed, hidden=64, layers=2)
        tiny_models.train(model, tiny_models.encode(tokenizer, taught), steps=400, batch=16, learning_rate=4e-3)
        tiny_models.save(model, tokenizer, root / name)
    draw = Random(0)
    labelled = []
    for row in rows:
        other = draw.choice([one["response"] for one in rows if one["response"] != row["response"]])
        lot = draw.random()
        label = {} if lot < 0.1 else {"response": other if lot < 0.37 else row["response"]}
        labelled.append({"prompt": row["prompt"], "skill": row["skill"], **label})
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (root / "truth.json").write_text(json.dumps({row["prompt"]: row["response"] for row in rows}))
    return root


def tree(root, output, **changes):
    teacher = {"dtype": "float32", "cpus": 1, "replicas": {"idle_s": 60}, "parity": False}
    made = {
        "recipe": "experts",
        "student": {"model": str(root / "pivot")},
        "teachers": [{"model": str(root / name), **teacher} for name in FIELDS],
        "data": {"path": str(root / "train.jsonl"), "unit_size": 8, "max_length": 200},
        "stages": [
            {"method": "sft", "steps": 4, "batch_size": 16, "learning_rate": 1e-3},
            {"method": "infifpo", "steps": 2, "batch_size": 16, "learning_rate": 1e-5},
        ],
        "consensus": {"max_new_tokens": 12, "replicas": {"idle_s": 60}},
        "output": str(output),
        "signals": {"k": 5},
    }
    return {**made, **changes}


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "consensus" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(knowing, tmp_path_factory, embedded_ray):
    folder = tmp_path_factory.mktemp("run")
    fuse(parse_config(tree(knowing, folder)))
    return folder


def test_the_choices_are_right(run, knowing):
    truth = json.loads((knowing / "truth.json").read_text())
    rows = rows_of(run, "choices")
    assert len(rows) > 150
    assert sum(truth[row["prompt"]] == row["response"] for row in rows) / len(rows) > 0.95
    labelled = [json.loads(line) for line in (knowing / "train.jsonl").read_text().splitlines()]
    of_prompt = {row["prompt"]: row.get("response") for row in labelled}
    for row in rows:  # what stages weigh by
        assert 0.5 <= row["sample_weight"] <= 1
        assert set(row["teacher_weights"]) == set(FIELDS)
    for row in rows:  # where the label is believed, its wording is kept, and who wrote it is told
        source = row["provenance"]["response"]["source"]
        assert (row["response"] == of_prompt[row["prompt"]]) == (source == "label")
        assert row["skill"] in FIELDS.values()


def test_the_summary_knows_the_sources(run, knowing):
    truth = json.loads((knowing / "truth.json").read_text())
    labelled = [json.loads(line) for line in (knowing / "train.jsonl").read_text().splitlines()]
    wrong = [truth[row["prompt"]] != row["response"] for row in labelled if "response" in row]
    found = summary(run)
    assert found["prompts"] == len(labelled)
    assert found["equivalence"]["name"] == "exact"
    assert found["fields"] == {"names": ["pets", "towns"], "given": True}
    assert found["wrong labels"]["right"] == pytest.approx(sum(wrong) / len(wrong), abs=0.05)
    right = {(one["source"], one["field"]): one["right"] for one in found["sources"]}
    for name, field in FIELDS.items():
        assert right[name, field] > 0.9
    assert right["math", "pets"] < 0.5
    assert right["code", "towns"] < 0.5
    assert found["findings"] == []
    assert json.loads((run / "results.json").read_text())["consensus"] == found


def test_doubtful_labels_and_pairs(run, knowing):
    truth = json.loads((knowing / "truth.json").read_text())
    doubtful = rows_of(run, "labels")
    assert sum(truth[row["prompt"]] != row["label"] for row in doubtful) / len(doubtful) > 0.95
    assert [row["right"] for row in doubtful] == sorted(row["right"] for row in doubtful)
    pairs = rows_of(run, "pairs")
    assert len(pairs) > 100
    assert sum(truth[row["prompt"]] == row["chosen"] != row["rejected"] for row in pairs) / len(pairs) > 0.95


def test_the_stages_learnt_from_it(run):
    config = parse_config(json.loads((run / "config.json").read_text()))
    data = config.data.model_copy(update={"path": str(run / "consensus" / "choices.jsonl")})
    assert len(read_samples(data)[0]) == json.loads((run / "results.json").read_text())["chosen"]["samples"]
    pairs = config.data.model_copy(update={"path": str(run / "consensus" / "pairs.jsonl")})
    results = json.loads((run / "results.json").read_text())
    assert len(read_preferences(pairs)[0]) == results["preferences"]["samples"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["01-sft"] * 4 + ["02-infifpo"] * 2


@pytest.mark.slow
def test_a_second_run_asks_nobody_and_chooses_the_same(run, knowing, tmp_path, monkeypatch):
    """The stores hold all answers and scores: neither generation nor scoring is sent to a replica."""
    answers = sorted(path for path in (run / "answers").rglob("*.json"))
    written = [path.stat().st_mtime_ns for path in answers]
    again = tree(
        knowing,
        tmp_path,
        signals={"k": 5, "store": str(run / "signals")},
        stages=[{"method": "sft", "steps": 1, "batch_size": 16, "learning_rate": 1e-3}],
    )
    again["consensus"] = {**again["consensus"], "store": str(run / "answers")}
    fuse(parse_config(again))
    for name in ("candidates", "choices", "pairs", "labels"):
        assert (tmp_path / "consensus" / f"{name}.jsonl").read_bytes() == (
            run / "consensus" / f"{name}.jsonl"
        ).read_bytes()
    assert [path.stat().st_mtime_ns for path in answers] == written


WEIGHED = [
    {"method": "infifusion", "teacher_weights": "consensus", "sample_weights": "consensus"},
    {"method": "bytekd", "teacher_weights": "consensus", "responses": "data"},
]


@pytest.mark.slow
def test_weights_reach_the_stages_and_a_replayed_run_has_the_same_bits(run, knowing, tmp_path):
    """From the same stores, in another folder: the weights, and with them the students, are bit-identical."""
    short = {"steps": 2, "batch_size": 16, "learning_rate": 1e-3}
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        again = tree(
            knowing,
            folder,
            signals={"k": 5, "store": str(run / "signals")},
            stages=[{**short, **stage} for stage in WEIGHED],
        )
        again["data"] = {**again["data"], "on_bad_row": "skip"}  # prompts without a label are none of `responses: data`
        again["consensus"] = {**again["consensus"], "store": str(run / "answers")}
        fuse(parse_config(again))
    for file in ("consensus/choices.jsonl", "consensus/candidates.jsonl", "model/model.safetensors"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()
    records = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["01-infifusion"] * 2 + ["02-bytekd"] * 2


@pytest.mark.slow
def test_free_text_is_scored_by_everybody(run, knowing, tmp_path):
    """The same prompts as if no two answers could be compared: every model scores every answer, kept in the store."""
    free = tree(
        knowing,
        tmp_path,
        signals={"k": 5, "store": str(run / "signals")},
        stages=[{"method": "sft", "steps": 1, "batch_size": 16, "learning_rate": 1e-3}],
    )
    free["consensus"] = {**free["consensus"], "store": str(run / "answers"), "equivalence": "none"}
    fuse(parse_config(free))
    truth = json.loads((knowing / "truth.json").read_text())
    rows = rows_of(tmp_path, "choices")
    assert sum(truth[row["prompt"]] == row["response"] for row in rows) / len(truth) > 0.9
    weights = rows_of(tmp_path, "candidates")
    own = [row["weights"][name] for row in weights for name, field in FIELDS.items() if row["field"] == field]
    other = [row["weights"][name] for row in weights for name, field in FIELDS.items() if row["field"] != field]
    assert sum(own) / len(own) > sum(other) / len(other) + 0.4


@pytest.mark.slow
def test_models_that_know_nothing_leave_the_labels(tiny, tmp_path):
    """Untrained teachers agree on nothing: the run says so and learns the labels as they are."""
    config = tiny.tree(tmp_path, recipe="experts", consensus={"max_new_tokens": 4, "pivot": False})
    config["stages"] = [{"method": "sft", "steps": 1, "batch_size": 16, "learning_rate": 1e-3}]
    fuse(parse_config(config))
    found = summary(tmp_path)
    assert found["fell back"]
    assert [finding["name"] for finding in found["findings"]] == ["no agreement"]
    labels = [json.loads(line) for line in (tiny.root / "train.jsonl").read_text().splitlines()]
    expected = {row["prompt"]: row["response"] for row in reversed(labels)}
    assert {row["prompt"]: row["response"] for row in rows_of(tmp_path, "choices")} == expected
    assert rows_of(tmp_path, "pairs") == []


def test_the_recipe_is_one_line(knowing, tmp_path):
    short = tree(knowing, tmp_path)
    del short["stages"], short["consensus"]
    config = parse_config(short)
    assert [stage.method for stage in config.stages] == ["sft"]
    assert config.consensus is not None
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_a_consensus_needs_somebody_who_answers(knowing, tmp_path):
    with pytest.raises(ConfigError, match="consensus needs a teacher that answers prompts; there are none"):
        parse_config(tree(knowing, tmp_path, teachers=[], stages=["sft"]))


def test_check_reads_rows_without_labels(knowing, tmp_path):
    findings = list(check_data(parse_config(tree(knowing, tmp_path))))
    assert not any(finding.fault for finding in findings)
    assert any("of the first 160 prompts have a label, 0 a trusted one" in finding.text for finding in findings)


def test_the_report_and_inspect_show_them(run):
    page = (run / "report.html").read_text()
    assert "<h2>Who is right</h2>" in page
    doubtful = rows_of(run, "labels")
    assert escape(doubtful[0]["prompt"]) in page
    console = Console(width=200, record=True)
    console.print(labels_table(run, 2))
    text = console.export_text()
    assert f"2 of {len(doubtful)} doubtful labels" in text
    assert doubtful[0]["prompt"] in text
    assert doubtful[2]["prompt"] not in text


def test_a_run_without_a_consensus_has_no_list(tmp_path):
    with pytest.raises(DataError, match="has no consensus"):
        labels_table(tmp_path, 5)
