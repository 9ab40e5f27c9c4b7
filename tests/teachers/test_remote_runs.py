"""Whole runs on an embedded Ray: a teacher behind a server, then the same run from its stored signals."""

import json
import shutil
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

from rayfuse.config import parse_config
from rayfuse.errors import TeacherError
from rayfuse.run.fuse import fuse
from rayfuse.signals.store import SignalStore
from tests.teachers.stand_in import StandIn

pytestmark = pytest.mark.slow
KEY = "sk-whole-run-0123456789abcdef"
VARIABLE = "RAYFUSE_RUN_KEY"
K = 5


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, embedded_ray):
    """Three finished runs of one configuration: `code` behind a server, both teachers stored, both here."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch, StandIn(tiny.model("code"), key=KEY) as server:
        patch.setenv(VARIABLE, KEY)
        math, code = tiny.tree(folder)["teachers"]
        endpoint = {"url": server.url, "model": server.name, "api_key_env": VARIABLE}
        behind = {"model": "acme-code", "name": "code", "backend": "openai", "tokenizer": tiny.model("code")}
        behind |= {"endpoint": endpoint, "replicas": {"idle_s": 5}}
        evaluate = {"path": str(tiny.root / "eval.jsonl"), "max_new_tokens": 4}

        def run(name, teachers, store):
            tree = tiny.tree(folder / name, teachers=teachers, evaluate=evaluate)
            fuse(parse_config({**tree, "signals": {"k": K, "store": str(folder / store)}}))

        run("remote", [math, behind], "store")
        names = {about["name"]: name for name, about in SignalStore(str(folder / "store")).known().items()}
        shutil.copytree(folder / "store", folder / "taken-along")
        stored = [{"model": f"acme-{n}", "name": n, "backend": "store", "stored": names[n]} for n in ("math", "code")]
        run("stored", stored, "taken-along")
        run("here", [math, code], "here-store")
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        server.key = "another"
        with pytest.raises(TeacherError) as refused:
            run("refused", [math, behind], "refused-store")
        yield folder, server, session, str(refused.value)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_teacher_behind_a_server_gives_the_model_of_the_same_teacher_here(runs):
    """Signals that differ by rounding, and so do four steps of training."""
    folder, server, _, _ = runs
    asked = [body["prompt"] for path, _, body in server.requests if body.get("prompt_logprobs") == K]
    assert sum(record["forwarded/code"] for record in records(folder / "remote")) <= len(asked)
    remote, here = (load_file(folder / name / "model" / "model.safetensors") for name in ("remote", "here"))
    for name, value in here.items():
        assert (value - remote[name]).abs().max() < 1e-3


def test_it_is_evaluated_through_its_server(runs):
    folder, *_ = runs
    remote, here = (
        {model["name"]: model for model in json.loads((folder / name / "results.json").read_text())["models"]}
        for name in ("remote", "here")
    )
    assert remote["code"]["bits_per_byte"] == pytest.approx(here["code"]["bits_per_byte"], abs=1e-5)
    assert remote["code"]["accuracy"] == here["code"]["accuracy"]


def test_stored_signals_give_the_same_bits_and_ask_nobody(runs):
    folder, *_ = runs
    weights = [(folder / run / "model" / "model.safetensors").read_bytes() for run in ("remote", "stored")]
    assert weights[0] == weights[1]
    of_run = records(folder / "stored")
    assert {record[f"forwarded/{name}"] for record in of_run for name in ("math", "code")} == {0}
    models = json.loads((folder / "stored" / "results.json").read_text())["models"]
    assert [model["role"] for model in models] == ["pivot", "stage"]
    page = (folder / "stored" / "report.html").read_text()
    assert "Not evaluated, because only stored signals are here: math, code." in page


def test_the_key_was_sent_and_stands_nowhere(runs, tiny):
    """Not in a run folder (configuration, metrics, results, report, card), a store, an error, or a log of Ray."""
    folder, server, session, refused = runs
    assert any(headers.get("Authorization") == f"Bearer {KEY}" for _, headers, _ in server.requests)
    assert "code: 127.0.0.1" in refused
    assert "refuses the API key (401: Unauthorized)" in refused
    assert KEY not in refused
    looked = 0
    for path in [*folder.rglob("*"), *session.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            looked += 1
            assert KEY.encode() not in path.read_bytes(), path
    assert looked > 500


def test_the_card_does_not_say_where_the_server_is(runs):
    folder, server, _, _ = runs
    card = (folder / "remote" / "model" / "README.md").read_text()
    assert "acme-code" in card
    assert str(server.server_port) not in card
    assert VARIABLE not in card
    assert VARIABLE in (folder / "remote" / "config.json").read_text()
