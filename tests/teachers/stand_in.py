"""An OpenAI-compatible completion server on loopback, in a thread, answering with a small transformers model.

It speaks the wire format of vLLM's server: /v1/models, /tokenize, /v1/completions with token ids or text, with
`prompt_logprobs`, or with `echo` and `logprobs`, and greedy generation. A test can put a fault in the way of any path.
"""

import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Fault = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: "StandIn"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        """Let the fault of this path act, or else answer honestly."""
        server = self.server
        server.requests.append((self.path, dict(self.headers), body))
        fault = server.faults.get(self.path)
        try:
            if fault is not None:
                fault(self, body)
            elif server.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {server.key}":
                self.send_json({"error": "Unauthorized"}, 401)
            else:
                with server.in_flight:
                    status, tree = server.honest(self.path, body)
                self.send_json(tree, status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def send_json(self, tree: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(tree).encode(), status, "application/json", **headers)

    def send(self, content: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)


class InFlight:
    """Counts the requests that are being answered at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.pause_s = 0.0

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.pause_s)

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.now -= 1


class StandIn(ThreadingHTTPServer):
    """The server; a context manager that ends it.

    Attributes:
        faults: by path, what happens instead of an honest answer.
        requests: (path, headers, body) of all requests so far.
        context: what it says as max_model_len; None: nothing.
        max_logprobs: more are refused, as vLLM refuses them.
        dialects: what it understands; another field is ignored, as most servers do. With "texts" it echoes texts.
        key: what it asks for, or None.
    """

    daemon_threads = True
    name = "served-code"

    def __init__(self, folder: str, *, key: str | None = None, certificate: tuple[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.key = key
        self.context: int | None = 256
        self.root = "/weights/code"
        self.max_logprobs = 20
        self.dialects = {"prompt_logprobs", "echo", "token_ids"}
        self.in_flight = InFlight()
        self.model_lock = threading.Lock()
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def honest(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON tree of the answer."""
        if path == "/v1/models":
            card = {"id": self.name, "object": "model", "created": int(time.time()), "root": self.root, "parent": None}
            return 200, {"object": "list", "data": [card | {"max_model_len": self.context}]}
        if path == "/tokenize":
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return 200, {"count": len(ids), "max_model_len": self.context, "tokens": ids}
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        k = max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
        if k > self.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, add_special_tokens=body.get("add_special_tokens", True))
        if self.context is not None and len(ids) + body["max_tokens"] > self.context:
            said = f"This model's maximum context length is {self.context} tokens."
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        with self.model_lock, torch.no_grad():
            logps_TV = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            new = self.generate(ids, body) if body["max_tokens"] else []
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(new, skip_special_tokens=True)}
        choice |= {"finish_reason": "length", "logprobs": None, "prompt_logprobs": None}
        if "token_ids" in self.dialects and body.get("return_token_ids"):
            choice |= {"token_ids": new, "prompt_token_ids": ids}
        if "prompt_logprobs" in self.dialects and body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [None, *self.prompt_rows(ids, logps_TV, k)]
        if "echo" in self.dialects and body.get("echo"):
            choice["logprobs"] = self.echoed(ids, logps_TV, k, as_ids="texts" not in self.dialects)
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice]}

    def generate(self, ids: list[int], body: dict[str, Any]) -> list[int]:
        end = (body.get("stop_token_ids") or [self.tokenizer.eos_token_id])[0]
        out = self.model.generate(
            torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False, eos_token_id=end, pad_token_id=end
        )
        return out[0, len(ids) :].tolist()

    def prompt_rows(self, ids: list[int], logps_TV: torch.Tensor, k: int) -> list[dict[str, Any]]:
        """As vLLM: the actual token first, then the k likeliest; one entry where it is among them."""
        rows = []
        for position in range(1, len(ids)):
            logps = logps_TV[position - 1]
            row = {str(ids[position]): self.entry(ids[position], logps)}
            for token in logps.topk(k).indices.tolist():
                row.setdefault(str(token), self.entry(token, logps))
            rows.append(row)
        return rows

    def entry(self, token: int, logps: torch.Tensor) -> dict[str, Any]:
        rank = int((logps >= logps[token]).sum())
        return {"logprob": logps[token].item(), "rank": rank, "decoded_token": self.tokenizer.decode([token])}

    def echoed(self, ids: list[int], logps_TV: torch.Tensor, k: int, *, as_ids: bool) -> dict[str, Any]:
        def text(token: int) -> str:
            return f"token_id:{token}" if as_ids else self.tokenizer.decode([token])

        top: list[Any] = [None]
        for position in range(1, len(ids)):
            likeliest = logps_TV[position - 1].topk(k).indices.tolist()
            top.append({text(t): logps_TV[position - 1, t].item() for t in [ids[position], *likeliest]})
        actual = [None, *(logps_TV[i, ids[i + 1]].item() for i in range(len(ids) - 1))]
        return {"tokens": [text(t) for t in ids], "token_logprobs": actual, "top_logprobs": top, "text_offset": []}
