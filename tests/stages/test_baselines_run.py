"""Every baseline from YAML through the actors: teachers on Serve, prepare tasks, student on Train, merge."""

import json

import pytest
import yaml
from safetensors.torch import load_file

from rayfuse.config import load_config
from rayfuse.run.fuse import fuse

pytestmark = pytest.mark.slow
TEACHERS = ("math", "code")
STEPS = 6
PARTS = {
    "kl": "loss_kl/{}",
    "minilogit": "loss_mse/{}",
    "uld": "loss_uld/{}",
    "uld_hybrid": "loss_hybrid/{}",
    "fusellm": "chosen/{}",
    "fusechat": "chosen/{}",
}
"""What each method's records must hold per teacher."""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, embedded_ray):
    """One run whose stages are all baselines, each from the pivot."""
    folder = tmp_path_factory.mktemp("baselines")
    common = {"steps": STEPS, "batch_size": 16, "learning_rate": 2e-3, "start_from": "pivot"}
    stages = [{"method": method, **common} for method in PARTS]
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny.tree(folder / "run", stages=stages)))
    fuse(load_config(folder / "run.yaml"))
    return folder / "run"


@pytest.mark.parametrize("method", PARTS)
def test_a_baseline_runs_from_yaml_and_learns(run, method, tiny):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    index = list(PARTS).index(method) + 1
    of_stage = [record for record in records if record["stage"].startswith(f"{index:02d}-{method}")]
    students = TEACHERS if method == "fusechat" else ("",)
    assert len(of_stage) == STEPS * len(students)
    for teacher in TEACHERS:
        name = PARTS[method].format(teacher)
        mine = [r for r in of_stage if method != "fusechat" or r["stage"].endswith(f"/{teacher}")]
        values = [record[name] for record in mine]
        assert all(value == value for value in values)
        if name.startswith("loss"):
            assert sum(values) > 0
    if method == "fusellm":
        chosen = {teacher: sum(record[f"chosen/{teacher}"] for record in of_stage) for teacher in TEACHERS}
        assert sum(chosen.values()) == 16 * STEPS
    if method == "fusechat":
        assert all(record[f"chosen/{record['stage'].split('/')[-1]}"] == 16 for record in of_stage)
    for student in students:
        losses = [r["loss"] for r in of_stage if r["stage"].endswith(student)]
        assert losses[-1] < losses[0]
    # The first of these stages asks the teachers for every text, the others find all in the store.
    asked = sum(
        record[f"forwarded/{teacher}"]
        for record in of_stage
        for teacher in TEACHERS
        if f"forwarded/{teacher}" in record
    )
    assert asked == (2 * 16 * STEPS if method == "kl" else 0)
    before = load_file(tiny.root / "pivot/model.safetensors")
    after = load_file(run / f"stages/{index:02d}-{method}/model/model.safetensors")
    assert any(not before[name].equal(value) for name, value in after.items())


def test_the_card_names_every_baseline(run):
    card = (run / "model/README.md").read_text()
    for method in PARTS:
        assert f"`{method}`" in card
    assert "Pairwise: a student per teacher, merged by sce." in card
