"""The `endpoint` section, and `rayfuse check` of a teacher behind a server."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayfuse.check import check_config
from rayfuse.config import config_json, parse_config
from rayfuse.config.public import public_config
from rayfuse.errors import ConfigError
from tests.teachers.stand_in import StandIn

URL = "https://teacher.example.com/v1"


def tree(section, **teacher):
    behind = {
        "model": "legal-14b",
        "backend": "openai",
        "tokenizer": "tokenizers/legal",
        "endpoint": section,
        **teacher,
    }
    return {"student": "a/b", "teachers": [behind], "data": "d.jsonl", "stages": ["infifusion"], "output": "run"}


def test_a_bare_url_is_enough_and_the_model_has_one_name():
    (teacher,) = parse_config(tree(f"{URL}/")).teachers
    assert (teacher.endpoint.url, teacher.endpoint.model, teacher.name) == (URL, "legal-14b", "legal-14b")


def test_a_folder_of_the_models_name_does_not_change_what_the_server_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "legal-14b").mkdir()
    config = parse_config(tree({"url": URL, "ca_file": "ca.pem", "api_key_file": "key"})).absolute()
    endpoint = config.teachers[0].endpoint
    assert endpoint.model == "legal-14b"
    assert (endpoint.ca_file, endpoint.api_key_file) == (str(tmp_path / "ca.pem"), str(tmp_path / "key"))


REFUSED = {
    "a key in the file": ({"url": URL, "api_key": "sk-secret"}, "endpoint.api_key: there is no such key"),
    "a key in place of a name": (
        {"url": URL, "api_key_env": "sk-secret"},
        "must be the NAME of an environment variable",
    ),
    "a key in the URL": (f"{URL}?key=sk-secret", "must end with its path"),
    "a password in the URL": ("https://me:sk-secret@teacher.example.com/v1", "has a user name or password in it"),
    "no URL": ("sk-secret", "is not a URL such as"),
    "another scheme": ("ftp://teacher.example.com", "is not a URL such as"),
    "no encryption": (
        "http://teacher.example.com/v1",
        "shows texts and key to everyone on the way to 'teacher.example",
    ),
    "an exception for another host": ({"url": URL, "insecure": "elsewhere"}, "must repeat the host of url"),
    "two keys": ({"url": URL, "api_key_env": "A", "api_key_file": "b"}, "give api_key_env or api_key_file, not both"),
    "no URL at all": ({"api_key_env": "A"}, "endpoint.url: is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_said_without_the_key(name):
    endpoint, said = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(endpoint))
    assert said in str(caught.value)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.0.0.5/v1", "http://[::1]:8000/v1"])
def test_this_machine_may_be_asked_without_encryption(url):
    assert parse_config(tree(url)).teachers[0].endpoint.url == url


def test_another_host_may_where_it_is_named():
    parse_config(tree({"url": "http://node-7:8000/v1", "insecure": "node-7"}))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"endpoint": None}, "a server needs `backend: openai` and `endpoint: {url: https://...}`"),
        ({"backend": "transformers"}, "backend transformers and `endpoint` do not go together"),
        ({"gpus": 1}, "backend openai runs no model here: gpus must be 0, but is 1"),
    ],
)
def test_backend_and_section_go_together(teacher, said):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(URL, **teacher))
    assert said in str(caught.value)


def test_the_card_names_neither_server_nor_key():
    config = parse_config(tree({"url": URL, "api_key_env": "LEGAL_KEY", "ca_file": "/etc/ssl/legal.pem"}))
    card = json.dumps(public_config(config))
    assert "legal-14b" in card
    assert not any(text in card for text in ("teacher.example.com", "LEGAL_KEY", "legal.pem"))
    assert parse_config(json.loads(config_json(config))) == config


def faults(tiny, folder, server, **endpoint):
    behind = {"model": "legal", "backend": "openai", "tokenizer": tiny.model("code"), "patience_s": 900}
    section = {"url": server.url, "model": server.name, **endpoint}
    config = parse_config(tiny.tree(folder / "run", teachers=[{**behind, "endpoint": section}]))
    return [f"{fault.where}: {fault.text}" for fault in check_config(config, Console(file=io.StringIO(), width=200))]


def test_check_probes_the_server(tiny, tmp_path):
    with StandIn(tiny.model("code")) as server:
        assert faults(tiny, tmp_path, server) == []
        (fault,) = faults(tiny, tmp_path, server, model="other")
        assert "teachers.0 (legal): teacher legal: 127.0.0.1" in fault
        assert "does not serve 'other' (it serves: served-code); set endpoint.model to one of them" in fault


def test_check_does_not_wait_for_a_server_that_is_down(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("rayfuse.check.PATIENCE_S", 0.2)
    with StandIn(tiny.model("code")) as server:
        pass
    (fault,) = faults(tiny, tmp_path, server)
    assert "cannot connect: " in fault
    assert "(patience_s: 0.2). Is the server up, and is endpoint.url right?" in fault


def test_check_says_which_tokenizer_is_missing(tiny, tmp_path):
    with StandIn(tiny.model("code")) as server:
        section = {"url": server.url, "model": server.name}
        behind = {"model": str(tmp_path / "nowhere"), "name": "legal", "backend": "openai", "endpoint": section}
        config = parse_config(tiny.tree(tmp_path / "run", teachers=[behind]))
        said = [fault.text for fault in check_config(config, Console(file=io.StringIO(), width=200))]
    assert any("Set `tokenizer` to a folder or hub id that has this teacher's tokenizer" in text for text in said)


def test_the_documentation_names_every_key():
    page = (Path(__file__).parents[2] / "docs" / "endpoints.md").read_text(encoding="utf-8")
    for name in parse_config(tree(URL)).teachers[0].endpoint.model_dump():
        assert f"`{name}`" in page
