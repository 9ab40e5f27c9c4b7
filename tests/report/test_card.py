import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayfuse.config import STAGES, Config, parse_config
from rayfuse.config.public import public_config, public_name
from rayfuse.report.card import write_card


def scores(name: str, role: str, right: int, interval: list[float], bits: float) -> dict[str, Any]:
    accuracy = {"all": {"right": right, "total": 200, "share": right / 200, "interval": interval}}
    interval_of_bits = [bits - 0.01, bits + 0.01]
    return {
        "name": name,
        "role": role,
        "bits_per_byte": bits,
        "bits_per_byte_interval": interval_of_bits,
        "accuracy": accuracy,
    }


MINIMAL = {"student": "org/pivot", "teachers": ["org/a", "org/b"], "data": "d.jsonl", "output": "o"}
RESULTS = {
    "data": {
        "rows": 12040,
        "bad_rows": 3,
        "samples": 11987,
        "too_long": 53,
        "cut": 7,
        "first_bad": "/home/me/data/train.jsonl, line 17: no messages",
    },
    "models": [
        scores("lists|expert", "teacher", 190, [0.91, 0.973], 1.2),
        scores("pivot", "pivot", 40, [0.15, 0.261], 0.9),
        scores("sft", "stage", 110, [0.481, 0.617], 0.6),
        scores("infifusion", "stage", 112, [0.49, 0.628], 0.65),
    ],
    "times": {"01-sft": 3.0},
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    pivot = tmp_path / "models" / "pivot"
    pivot.mkdir(parents=True)
    return parse_config(
        {
            "student": {"model": str(pivot), "trust_remote_code": str(pivot), "tokenizer": f"{pivot}/"},
            "teachers": [
                {"model": "/srv/models/lists-expert", "weight": 2.0},
                "HuggingFaceTB/SmolLM2-135M-Instruct",
            ],
            "data": "/home/me/data/train.jsonl",
            "stages": ["sft", {"method": "infifusion", "lam": 0.75, "steps": 1200}],
            "output": str(tmp_path / "runs" / "fused"),
            "signals": {"store": "s3://bucket/signals?token=secret"},
            "evaluate": str(tmp_path / "heldout.jsonl"),
            "cluster": {"address": "ray://10.1.2.3:10001"},
        }
    )


@pytest.fixture
def card(tmp_path: Path, config: Config) -> str:
    write_card(tmp_path / "README.md", config, RESULTS)
    return (tmp_path / "README.md").read_text()


def test_front_matter(card: str) -> None:
    _, front, _ = card.split("---\n", 2)
    tree = yaml.safe_load(front)
    assert tree["library_name"] == "transformers"
    assert tree["base_model"] == ["pivot", "lists-expert", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert {"rayfuse", "model-fusion"} <= set(tree["tags"])
    assert "license" not in tree


def test_nothing_of_the_machine_leaks(card: str, tmp_path: Path) -> None:
    for private in (str(tmp_path), "/home/me", "/srv", "secret", "10.1.2.3"):
        assert private not in card
    assert not re.search(r"(?<![\w:/.<])/[a-z]+/", card)


def test_the_configuration_parses_back(card: str, config: Config) -> None:
    text = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert text is not None
    tree = yaml.safe_load(text[1])
    back = parse_config(tree)
    assert back.student.model == back.student.tokenizer == back.student.trust_remote_code == "pivot"
    assert [teacher.model for teacher in back.teachers] == ["lists-expert", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert [teacher.name for teacher in back.teachers] == [teacher.name for teacher in config.teachers]
    assert back.stages == config.stages
    assert (back.data.path, back.output, back.signals.store) == ("train.jsonl", "fused", "s3://bucket/signals")
    assert public_config(back) == tree


def test_result_table(card: str) -> None:
    assert "| lists&#124;expert (teacher) | 95.0% (91.0–97.3) | 1.200 (1.190–1.210) |" in card
    assert "| sft | 55.0% (48.1–61.7) | **0.600** (0.590–0.610) |" in card
    assert "| infifusion | **56.0%** (49.0–62.8) | 0.650 (0.640–0.660) |" in card


def test_it_is_honest(card: str) -> None:
    assert "infifusion answers 56% of 200 held-out items; sft alone 55%, the pivot 20%" in card
    assert "This does not show that infifusion is better than sft alone" in card
    assert "infifusion starts from sft's model, so it has also trained for longer." in card


def test_what_was_done(card: str) -> None:
    assert "[arXiv 2501.02795](https://arxiv.org/abs/2501.02795)" in card
    assert "0.25 x cross-entropy + 0.75 x the sum over the teachers" in card
    assert "z-scored top-10 logits" in card
    assert "1,200 steps of 64 samples" in card
    assert "1 epoch of 64 samples" in card
    assert "12,040 rows of `train.jsonl`; 3 malformed rows were skipped, 53 samples longer than 4,096 tokens" in card
    assert "Trained on 11,987 samples" in card


def test_the_snippet_is_python(card: str) -> None:
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in code[1]


def test_without_teachers_or_evaluation(tmp_path: Path) -> None:
    config = parse_config(
        {"student": "org/pivot", "teachers": ["org/unused"], "data": "d.jsonl", "stages": ["sft"], "output": "o"}
    )
    write_card(tmp_path / "README.md", config, {"data": RESULTS["data"], "models": [], "times": {}})
    card = (tmp_path / "README.md").read_text()
    tree = yaml.safe_load(card.split("---\n", 2)[1])
    assert tree["base_model"] == ["org/pivot"]
    assert "model-fusion" not in tree["tags"]
    assert "## Result" not in card
    assert "trust_remote_code=True" not in card


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/srv/models/expert", "expert"),
        ("/expert", "expert"),
        ("~/models/expert/", "expert"),
        ("../expert", "expert"),
        ("runs/world/expert", "expert"),
        (r"C:\models\expert", "expert"),
        ("file:///srv/models/expert", "expert"),
        ("s3://me:password@bucket/a/b?token=1", "s3://bucket/a/b"),
        ("hf://datasets/org/data", "hf://datasets/org/data"),
    ],
)
def test_public_name(value: str, shown: str) -> None:
    assert public_name(value) == shown


def test_a_relative_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "expert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/expert") == "expert"


@pytest.mark.parametrize("method", STAGES)
def test_every_method_has_its_sentence(config: Config, method: str) -> None:
    """A stage without a text would fail only at the end of a long run."""
    (stage,) = parse_config({**MINIMAL, "preferences": "p.jsonl", "stages": [method]}).stages
    text = stage.text(7)
    assert text.startswith(f"`{method}`")
    assert text.endswith(".")
    kept = stage.kept(7)
    assert ("top-7" in text) == (kept == 7 and stage.uses_teachers)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"dtype": "bfloat16", "update_kept": 0.0123}, "in bfloat16. 1.2% of the training's update survives"),
        ({"dtype": "float32", "update_kept": None}, "The weights are in float32.\n"),
    ],
)
def test_the_card_says_what_the_weights_number_format_costs(config: Config, tmp_path: Path, saved, said):
    write_card(tmp_path / "README.md", config, {**RESULTS, "saved": saved})
    assert said in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_of_preferences_alone_names_no_teachers(tmp_path: Path) -> None:
    """DPO's reference is the pivot, whatever teachers the configuration has."""
    config = parse_config({**MINIMAL, "preferences": "p.jsonl", "stages": ["dpo"]})
    write_card(tmp_path / "README.md", config, {"models": []})
    card = (tmp_path / "README.md").read_text().partition("## Configuration")[0]
    assert "org/b" not in card
    assert "`org/pivot`, trained with rayfuse." in card


def test_the_card_names_only_data_that_led_to_this_model(tmp_path):
    tree = {
        "student": "pivot",
        "teachers": ["a"],
        "data": "train.jsonl",
        "consensus": {},
        "stages": [{"method": "sft", "responses": "data"}, {"method": "sft", "start_from": "pivot"}],
        "output": str(tmp_path / "run"),
    }
    results = {"data": RESULTS["data"], "chosen": {**RESULTS["data"], "samples": 77}, "models": [], "times": {}}
    write_card(tmp_path / "README.md", parse_config(tree), results)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "77 answers and labels that are probably right" in card
    assert "malformed rows" not in card
    tree["stages"][1]["start_from"] = "previous"
    write_card(tmp_path / "README.md", parse_config(tree), results)
    both = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "77 answers" in both
    assert "malformed rows" in both
