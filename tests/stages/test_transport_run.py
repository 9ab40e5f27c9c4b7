"""The methods in optimal transport from YAML through the actors, the exact mode of InfiGFusion among them."""

import json

import pytest
import yaml

from rayfuse.config import load_config
from rayfuse.run.fuse import fuse

pytestmark = pytest.mark.slow
STEPS = 15
"""Of 16 samples: two passes over the 120."""
STAGES = {
    "infigfusion": ({"mode": "exact", "k": 4, "alpha": 20}, "loss_gld"),
    "sinkhorn": ({}, "loss_ot"),
    "wasserstein_kl": ({}, "loss_wkl"),
    "multilevelot": ({}, "loss_ot"),
}
"""Per method: its knobs, and the name of its distance in the metrics."""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory, embedded_ray):
    """One run with a stage of each, from the pivot."""
    folder = tmp_path_factory.mktemp("transport")
    common = {"steps": STEPS, "batch_size": 16, "learning_rate": 2e-3, "start_from": "pivot"}
    stages = [{"method": method, **knobs, **common} for method, (knobs, _) in STAGES.items()]
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny.tree(folder / "run", stages=stages)))
    fuse(load_config(folder / "run.yaml"))
    return folder / "run"


@pytest.mark.parametrize("method", STAGES)
def test_it_learns_from_both_teachers(run, method):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_stage = [record for record in records if record["stage"].endswith(method)]
    assert [record["step"] for record in of_stage] == list(range(1, STEPS + 1))
    for teacher in ("math", "code"):
        distances = [record[f"{STAGES[method][1]}/{teacher}"] for record in of_stage]
        assert min(distances) > 0
        assert sum(record[f"forwarded/{teacher}"] for record in of_stage) == (120 if method == "infigfusion" else 0)
    losses = [record["loss"] for record in of_stage]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert f"`{method}`" in (run / "model/README.md").read_text()


def test_the_exact_mode_waits_for_its_couplings_and_says_how_long(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    exact = [record for record in records if record["stage"].endswith("infigfusion")]
    assert all(0 < record["coupling_wait"] < record["seconds"] for record in exact)
    assert all(record["gradient_ratio"] > 0 for record in exact)
