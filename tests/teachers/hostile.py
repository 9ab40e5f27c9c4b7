"""What a server can do wrong, and exactly what rayfuse says to it.

    python -m tests.teachers.hostile > docs/hostile-endpoints.md

test_hostile_endpoint.py runs the same cases and compares what is said with that page, so the page is true.
"""

import gzip
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfuse.config import Teacher
from rayfuse.data.sample import Sample
from rayfuse.errors import TeacherError
from rayfuse.quickstart.skills import make
from rayfuse.quickstart.tiny_models import STYLES, make_model, make_tokenizer, save
from rayfuse.teachers.openai.backend import OpenAITeacher
from tests.teachers.stand_in import Fault, Handler, StandIn

KEY = "sk-hostile-0123456789"
K = 5
KEY_VARIABLE = "RAYFUSE_HOSTILE_KEY"
PAGE = Path(__file__).parents[2] / "docs" / "hostile-endpoints.md"
SAMPLE = Sample((("user", "hello"),), "four five")
COMPLETIONS, MODELS, TOKENIZE = "/v1/completions", "/v1/models", "/tokenize"


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        does: what the server does.
        faults: by path, instead of honest answers.
        start: whether the fault is there from the start, so that the teacher cannot be made; else it comes later.
        server: attributes of the server.
        endpoint: keys of the endpoint section; `key: False` sends no key.
    """

    does: str
    faults: dict[str, Fault] = field(default_factory=dict)
    start: bool = False
    server: dict[str, Any] = field(default_factory=dict)
    endpoint: dict[str, Any] = field(default_factory=dict)


def heard(case: Case, server: StandIn, tokenizer: str) -> str:
    """What rayfuse says in this case; the server is honest again afterwards. KEY_VARIABLE must be set to KEY."""
    before = {name: getattr(server, name) for name in case.server}
    endpoint = {"url": server.url, "model": server.name, "api_key_env": KEY_VARIABLE, **case.endpoint}
    if endpoint.pop("key", True) is False:
        del endpoint["api_key_env"]
    description = {"model": "legal", "name": "legal", "backend": "openai", "tokenizer": tokenizer, "patience_s": 0.5}
    teacher = Teacher.model_validate({**description, "endpoint": endpoint})
    try:
        for name, value in case.server.items():
            setattr(server, name, value)
        if case.start:
            server.faults.update(case.faults)
        made = OpenAITeacher(teacher, K)
        try:
            server.faults.update(case.faults)
            made.score([SAMPLE])
        finally:
            made.close()
    except TeacherError as error:
        said = str(error)
    else:
        raise AssertionError(f"nothing was said to: {case.does}")
    finally:
        server.faults.clear()
        for name, value in before.items():
            setattr(server, name, value)
    said = said.replace(f"127.0.0.1:{server.server_port}", "HOST").replace(tokenizer, "TOKENIZER")
    return re.sub(r"Tried \d+ times? in \d+ s", "Tried N times in S s", said)


# --- faults ------------------------------


def rows(change: Callable[[list[Any]], Any]) -> dict[str, Fault]:
    """An honest answer whose prompt_logprobs are changed (in place, or by what `change` returns)."""

    def fault(handler: Handler, request: dict[str, Any]) -> None:
        _, tree = handler.server.honest(handler.path, request)
        choice = tree["choices"][0]
        new = change(choice["prompt_logprobs"])
        choice["prompt_logprobs"] = new if isinstance(new, list) else choice["prompt_logprobs"]
        handler.send_json(tree)

    return {COMPLETIONS: fault}


def text(change: Callable[[bytes], bytes]) -> dict[str, Fault]:
    """An honest answer whose bytes are changed."""

    def fault(handler: Handler, request: dict[str, Any]) -> None:
        _, tree = handler.server.honest(handler.path, request)
        handler.send(change(json.dumps(tree).encode()))

    return {COMPLETIONS: fault}


def whole(tree: Any) -> dict[str, Fault]:
    """This JSON instead of an answer."""
    return {COMPLETIONS: lambda handler, request: handler.send_json(tree)}


def status(code: int, tree: Any, **headers: str) -> Fault:
    return lambda handler, request: handler.send_json(tree, code, **headers)


def without(*removed: str) -> Fault:
    """An honest answer without these keys of its choice."""

    def fault(handler: Handler, request: dict[str, Any]) -> None:
        code, tree = handler.server.honest(handler.path, request)
        for key in removed:
            tree["choices"][0].pop(key, None)
        handler.send_json(tree, code)

    return fault


def set_last(value: float) -> Callable[[list[Any]], None]:
    """The likeliest entry of the last position gets this log-probability."""

    def change(rows: list[Any]) -> None:
        max(rows[-1].values(), key=lambda entry: entry["logprob"])["logprob"] = value

    return change


def rename(new: Callable[[list[Any]], str], which: int) -> Callable[[list[Any]], None]:
    """An entry of the last position gets another token id; `which` counts from the actual token, which comes first."""

    def change(rows: list[Any]) -> None:
        name = new(rows)
        rows[-1] = {name if i == which else token: entry for i, (token, entry) in enumerate(rows[-1].items())}

    return change


def shorten(rows: list[Any]) -> None:
    for row in rows[1:]:
        while len(row) > 3:
            row.popitem()


def all_of(rows: list[Any], value: float) -> None:
    for entry in rows[-1].values():
        entry["logprob"] = value


def lower_limit(handler: Handler, request: dict[str, Any]) -> None:
    """Silently gives three log-probabilities, whatever is asked."""
    code, tree = handler.server.honest(handler.path, request)
    if tree["choices"][0]["prompt_logprobs"]:
        shorten(tree["choices"][0]["prompt_logprobs"])
    handler.send_json(tree, code)


def as_logits(handler: Handler, request: dict[str, Any]) -> None:
    """What `--logprobs-mode raw_logits` gives."""
    code, tree = handler.server.honest(handler.path, request)
    for row in tree["choices"][0]["prompt_logprobs"] or []:
        for entry in (row or {}).values():
            entry["logprob"] += 9.0
    handler.send_json(tree, code)


def twice(content: bytes) -> bytes:
    """Writes the last position by hand, with one id standing twice in it."""
    tree = json.loads(content)
    *others, (_, entry) = tree["choices"][0]["prompt_logprobs"].pop().items()
    names = [*others, (others[-1][0], entry)]
    row = "{" + ", ".join(f'"{name}": {json.dumps(value)}' for name, value in names) + "}"
    tree["choices"][0]["prompt_logprobs"].append("ROW")
    return json.dumps(tree).replace('"ROW"', row).encode()


def endless(handler: Handler, request: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    handler.close_connection = True
    for _ in range(4096):
        handler.wfile.write(b" " * 2**16)


def bomb(handler: Handler, request: dict[str, Any]) -> None:
    """256 MiB of blanks in 256 kB."""
    handler.send(gzip.compress(b" " * 2**28, 1), Content_Encoding="gzip")


def html(handler: Handler, request: dict[str, Any]) -> None:
    page = b"<html><head><title>Log in</title></head><body>Please log in to continue</body></html>"
    handler.send(page, 200, "text/html; charset=utf-8")


def bad_gateway(handler: Handler, request: dict[str, Any]) -> None:
    handler.send(b"<html><body><h1>502 Bad Gateway</h1>nginx</body></html>", 502, "text/html")


def hang_up(handler: Handler, request: dict[str, Any]) -> None:
    handler.close_connection = True


def half(handler: Handler, request: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def silence(handler: Handler, request: dict[str, Any]) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def drip(handler: Handler, request: dict[str, Any]) -> None:
    """A byte every tenth of a second, for ever: no pause between two bytes is long."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def no_http(handler: Handler, request: dict[str, Any]) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


def blames_the_key(handler: Handler, request: dict[str, Any]) -> None:
    said = f"Incorrect API key provided: {handler.headers['Authorization'].removeprefix('Bearer ')}."
    handler.send_json({"error": {"message": said}}, 401)


def other_ids(handler: Handler, request: dict[str, Any]) -> None:
    ids = handler.server.tokenizer.encode(request["prompt"], add_special_tokens=False)
    handler.send_json({"tokens": [*ids[:6], ids[6] + 1, *ids[7:]]})


def other_names(handler: Handler, request: dict[str, Any]) -> None:
    code, tree = handler.server.honest(handler.path, request)
    choice = tree["choices"][0]
    choice.pop("prompt_token_ids", None)
    for row in choice["prompt_logprobs"] or []:
        for token, entry in (row or {}).items():
            entry["decoded_token"] = handler.server.tokenizer.decode([int(token) - 1])
    handler.send_json(tree, code)


def no_names(handler: Handler, request: dict[str, Any]) -> None:
    code, tree = handler.server.honest(handler.path, request)
    choice = tree["choices"][0]
    choice.pop("prompt_token_ids", None)
    for row in choice["prompt_logprobs"] or []:
        for entry in (row or {}).values():
            del entry["decoded_token"]
    handler.send_json(tree, code)


AWAY = "https://collector.example.com/v1/completions"
UNKNOWN = status(404, {"detail": "Not Found"})

CASES = [
    # --- at the start
    Case("answers nothing within the time", {MODELS: silence}, start=True, endpoint={"timeout_s": 0.2}),
    Case("sends its answer a byte at a time", {MODELS: drip}, start=True, endpoint={"timeout_s": 0.3}),
    Case("does not speak HTTP", {MODELS: no_http}, start=True),
    Case("asks for a key, and none is configured", start=True, server={"key": KEY}, endpoint={"key": False}),
    Case("refuses the key", start=True, server={"key": "another"}),
    Case("refuses the key and repeats it", {MODELS: blames_the_key}, start=True),
    Case("shows a log-in page", {MODELS: html}, start=True),
    Case("has no such path (the URL lacks /v1)", {MODELS: UNKNOWN}, start=True),
    Case("lists its models in another form", {MODELS: status(200, {"models": ["a"]})}, start=True),
    Case("serves other models", start=True, endpoint={"model": "legal-14b"}),
    Case("does not say how long a text may be", start=True, server={"context": None}),
    Case("takes shorter texts than configured", start=True, endpoint={"context": 4096}),
    Case("reads a text as other tokens (/tokenize)", {TOKENIZE: other_ids}, start=True),
    Case("has no /tokenize, and names other tokens", {TOKENIZE: UNKNOWN, COMPLETIONS: other_names}, start=True),
    Case("has no /tokenize, and names no tokens", {TOKENIZE: UNKNOWN, COMPLETIONS: no_names}, start=True),
    Case("allows fewer log-probabilities", start=True, server={"max_logprobs": 3}),
    Case("silently gives fewer log-probabilities", {COMPLETIONS: lower_limit}, start=True),
    Case("knows neither prompt_logprobs nor echo", start=True, server={"dialects": {"token_ids"}}),
    Case("echoes token texts instead of ids", start=True, server={"dialects": {"token_ids", "echo", "texts"}}),
    Case("gives logits (--logprobs-mode raw_logits)", {COMPLETIONS: as_logits}, start=True),
    # --- later: the way
    Case("redirects to another host", {COMPLETIONS: status(307, {}, Location=AWAY)}),
    Case("is overloaded for ever (429, Retry-After: 3600)", {COMPLETIONS: status(429, {}, Retry_After="3600")}),
    Case("fails for ever (503)", {COMPLETIONS: status(503, {"error": {"message": "engine is dead"}})}),
    Case("stands behind a proxy that has lost it (502)", {COMPLETIONS: bad_gateway}),
    Case("refuses the request (400)", {COMPLETIONS: status(400, {"error": {"message": "no\n\tsuch\x00thing"}})}),
    Case("hangs up", {COMPLETIONS: hang_up}),
    Case("hangs up in the middle of its answer", {COMPLETIONS: half}),
    Case("never stops sending", {COMPLETIONS: endless}),
    Case("sends 256 MiB in 256 kB of gzip", {COMPLETIONS: bomb}),
    Case("answers with a page", {COMPLETIONS: html}),
    # --- later: the answer
    Case("sends bytes that are no JSON", text(lambda _: b"\x00\xff\xfe garbage")),
    # From a fixed place on: what stands before it holds the model's folder, whose length is nobody's.
    Case("sends half of its JSON", text(lambda content: b"{" + content[content.index(b'"choices"') :][:2000])),
    Case("nests its JSON ten thousand deep", text(lambda _: b'{"choices": ' + b"[" * 10_000 + b"]" * 10_000 + b"}")),
    Case("sends JSON of another form", whole({"answer": 42})),
    Case("sends no choice", whole({"choices": []})),
    Case("sends two choices", whole({"choices": [{"prompt_logprobs": []}] * 2})),
    Case("sends text for a number", rows(set_last("likely"))),
    Case("sends NaN", rows(set_last(float("nan")))),
    Case("sends 1e999", text(lambda c: re.sub(rb'"logprob": -[0-9.]+', b'"logprob": -1e999', c, count=9))),
    Case("leaves the log-probabilities out", {COMPLETIONS: without("prompt_logprobs")}),
    Case("leaves the last position out", rows(lambda all_rows: all_rows[:-1])),
    Case("has one position too many", rows(lambda all_rows: [*all_rows, all_rows[-1]])),
    Case("sends null for a position", rows(lambda all_rows: [*all_rows[:-1], None])),
    Case("gives three log-probabilities at a position", rows(shorten)),
    Case("gives one token twice", text(twice)),
    Case("names a token outside the vocabulary", rows(rename(lambda _: "640", 2))),
    Case("names a token -1", rows(rename(lambda _: "-1", 2))),
    Case("names a token by a word", rows(rename(lambda _: "five", 2))),
    Case("leaves out the token that stands there", rows(rename(lambda _: "7", 0))),
    Case("gives a log-probability above 0", rows(set_last(0.25))),
    Case("gives probabilities that add up to 5", rows(lambda all_rows: all_of(all_rows, -0.001))),
    Case("gives minus infinity as -9999", rows(lambda all_rows: all_of(all_rows, -9999.0))),
]


# --- the page ------------------------------

HEAD = """# Hostile endpoints: each case, and what rayfuse said

Written by `python -m tests.teachers.hostile`; `tests/teachers/test_hostile_endpoint.py` compares every line with what
is said now. HOST stands for the server's address, TOKENIZER for the configured folder. The first {start} faults are
there when a teacher starts, the others come later, from a server that answered well before. Every message begins with
`teacher legal: HOST`.

| the server | rayfuse |
|---|---|
"""


def make_served(folder: Path) -> Path:
    """The small model behind the server, and its tokenizer."""
    texts = [f"{row['prompt']} {row['response']}" for skill in ("math", "code") for row in make(skill, 40, seed=1)]
    tokenizer = make_tokenizer(STYLES["code"], texts)
    save(make_model(tokenizer, 0, hidden=32, layers=1), tokenizer, folder)
    return folder


def row(case: Case, said: str) -> str:
    """A case's line of the table."""
    said = said.removeprefix("teacher legal: HOST ").replace("|", "\\|")
    return f"| {case.does} | {said} |"


def main() -> None:
    os.environ[KEY_VARIABLE] = KEY
    with tempfile.TemporaryDirectory() as folder:
        served = str(make_served(Path(folder)))
        with StandIn(served) as server:
            print(HEAD.format(start=sum(case.start for case in CASES)), end="")
            for case in CASES:
                print(row(case, heard(case, server, served)), flush=True)


if __name__ == "__main__":
    main()
