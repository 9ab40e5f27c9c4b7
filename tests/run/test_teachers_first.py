"""Teachers first, then the student: the same signals and the same model as online. And runs that lose a teacher."""

import json
from pathlib import Path

import pytest
from ray import serve
from rich.console import Console
from safetensors.torch import load_file

from rayfuse.config import parse_config
from rayfuse.errors import MissingSignalsError, TeacherGoneError
from rayfuse.run.fuse import fuse
from rayfuse.teachers.identity import IdentifiedTeacher, fingerprint
from rayfuse.teachers.serving import applications
from rayfuse.teachers.serving.replica import TeacherReplica

pytestmark = pytest.mark.slow
STAGES = [{"method": "infifusion", "steps": 4, "batch_size": 16, "learning_rate": 1e-3}]


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def _records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_first_gives_the_signals_and_the_model_of_online(tiny, tmp_path, embedded_ray):
    outputs = {}
    for mode in ("online", "first"):
        outputs[mode] = tmp_path / mode
        seen = Console(record=True, width=200)
        fuse(parse_config(tiny.tree(outputs[mode], stages=STAGES, serving={"mode": mode})), console=seen)
    assert "math, code filled the store (128 texts scored, 0 found there)" in seen.export_text()
    signals = {mode: _files(output / "signals") for mode, output in outputs.items()}
    assert len(signals["online"]) == 2 * 64
    assert signals["online"] == signals["first"]
    models = [load_file(output / "model/model.safetensors") for output in outputs.values()]
    assert all(models[0][name].equal(models[1][name]) for name in models[0])
    assert all(record["forwarded/math"] == 0 and record["stored/math"] == 16 for record in _records(outputs["first"]))
    assert not serve.status().applications, "the teachers give their memory back before the student starts"


def test_a_run_goes_on_without_a_teacher_that_never_answers(tiny, tmp_path, embedded_ray):
    """The second teacher's weights are gone when its copies start: dropped, counted in metrics and report."""
    tree = tiny.tree(tmp_path / "run", stages=STAGES, serving={"on_missing": "drop", "max_dropped": 0.5})
    tree["teachers"][1]["replicas"] = {"idle_s": 5}
    config = parse_config(tree)
    _break(config, 1)
    fuse(config)
    records = _records(tmp_path / "run")
    assert sum(record["dropped/code"] for record in records) == 64
    assert sum(record["dropped/math"] for record in records) == 0
    assert all(record["loss_uld/code"] == 0 for record in records)
    page = (tmp_path / "run/report.html").read_text()
    assert "64 (sample, teacher) pairs" in page

    twin = tiny.tree(tmp_path / "alone", stages=[{**STAGES[0], "lam": 0.5}])
    twin["teachers"] = [{**twin["teachers"][0], "weight": 2.0}]
    fuse(parse_config(twin))
    mine, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "alone"))
    for name, value in theirs.items():
        assert (mine[name] - value).abs().max() < 1e-5, "the one that is left counts for both"


def test_more_than_may_be_dropped_ends_the_run(tiny, tmp_path, embedded_ray):
    tree = tiny.tree(tmp_path / "run", stages=STAGES, serving={"on_missing": "drop", "max_dropped": 0.2})
    config = parse_config(tree)
    _break(config, 1)
    with pytest.raises(MissingSignalsError, match=r"32 \(sample, teacher\) pairs were dropped.*more than 20.00%"):
        fuse(config)
    assert sum(record["dropped/code"] for record in _records(tmp_path / "run")) == 32

    failing = tiny.tree(tmp_path / "failing", stages=STAGES)
    config = parse_config(failing)
    _break(config, 1)
    with pytest.raises(TeacherGoneError, match="cannot start"):
        fuse(config)


def _break(config, index):
    """Deploy teacher `index` under its own name, but from a folder that is not there."""
    from rayfuse import cluster

    cluster.connect(config)
    applications.start_serve()
    teacher = config.teachers[index]
    name = applications.application_name(IdentifiedTeacher(teacher, fingerprint(teacher, config.signals.k)))
    if name in serve.status().applications:
        serve.delete(name)
    broken = teacher.model_copy(update={"model": str(Path(config.output) / "nowhere")})
    options = cluster.teacher_deployment(teacher)
    served = serve.deployment(TeacherReplica, name=teacher.name, **options).bind(broken, config.signals.k)
    serve.run(served, name=name, route_prefix=None)
