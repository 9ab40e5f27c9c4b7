"""The routes: scores, completions, which teachers there are, and the description of all this.

POST /score                  a data set's rows -> signals, as JSON or (Accept: application/x-safetensors) as arrays
POST /v1/completions         OpenAI's form; the prompt is one user turn, in the teacher's own chat template
POST /v1/chat/completions    OpenAI's form
GET  /v1/models, /health, /openapi.json, /docs
"""

from __future__ import annotations

import html
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save
from starlette.concurrency import run_in_threadpool

from rayfuse import __version__
from rayfuse.config import Http
from rayfuse.data.render import Renderer
from rayfuse.data.rows import samples_of_row
from rayfuse.data.sample import Message, Sample, Turns
from rayfuse.errors import AlignmentError, DataError, RayfuseError, TeacherGoneError
from rayfuse.signals.codec import pack
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.web.gate import BusyError, Queue, fault

SAFETENSORS = "application/x-safetensors"
T = TypeVar("T")


class Client(Protocol):
    """What a teacher looks like from here; see teachers.deployment.TeacherClient."""

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        """Send a unit; the returned function waits."""

    def generate(
        self, samples: Sequence[Sample], *, max_new_tokens: int, batch_size: int, temperature: float, seed: int
    ) -> Callable[[], list[str]]:
        """Send prompts; the returned function waits."""


class Body(BaseModel):
    """Base of every request: keys that are not known are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class ScoreRequest(Body):
    """What a teacher would say next, at every position of each response."""

    teacher: str = Field(description="name of a teacher, see /v1/models")
    samples: list[dict[str, Any]] = Field(
        min_length=1,
        description="rows of a data set: prompt and response, or messages; one sample per assistant turn",
    )


class Signals(BaseModel):
    """One sample's signals; L rows for a response of L - 1 teacher tokens, row i the prediction after i of them."""

    logps: list[list[float]] = Field(description="[L, K] top log-probabilities (nats), sorted descending")
    ids: list[list[int]] = Field(description="[L, K] the teacher's token ids of them")
    lse: list[float | None] = Field(description="[L] log-sum-exp of the raw logits, null where it is not known")
    token_logps: list[float] = Field(description="[L] log-probability of the token that follows (last: end of turn)")
    byte_ends: list[int] = Field(description="[L - 1] bytes of the response read after each of its tokens")


class ScoreResponse(BaseModel):
    """The signals of all samples, in order."""

    teacher: str
    fingerprint: str = Field(description="hash of everything the signals depend on")
    k: int
    signals: list[Signals]


class Sampling(Body):
    """What the two completion routes share. Other parameters of OpenAI's are accepted where they change nothing."""

    model: str = Field(description="name of a teacher, see /v1/models")
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    seed: int = Field(0, ge=0)
    n: Literal[1] = 1
    stream: Literal[False] = False
    top_p: Literal[1] = 1
    user: str | None = None


class CompletionRequest(Sampling):
    """Prompts to be answered; each is one user turn."""

    prompt: str | list[str]


class ChatMessage(Body):
    """One turn of a conversation."""

    role: str
    content: str


class ChatRequest(Sampling):
    """A conversation to be continued by the assistant."""

    messages: list[ChatMessage] = Field(min_length=1)


class Front:
    """The teachers behind the routes.

    Args:
        teachers: those that can be asked.
        http: limits.
        connect: how a teacher is reached.
    """

    def __init__(
        self, teachers: Sequence[IdentifiedTeacher], http: Http, connect: Callable[[IdentifiedTeacher], Client]
    ) -> None:
        self.http = http
        # A person does not wait as long as a run does.
        self.teachers = {
            one.name: replace(one, teacher=one.teacher.model_copy(update={"patience_s": http.timeout_s}))
            for one in teachers
        }
        self.queues = {name: Queue(http.in_flight, http.queue) for name in self.teachers}
        self._connect = lru_cache(maxsize=None)(lambda name: connect(self.teachers[name]))
        self._renderer = lru_cache(maxsize=None)(lambda name: Renderer.of(self.teachers[name].teacher))

    async def ask(self, name: str, question: Callable[[Client], Callable[[], T]]) -> T:
        """Wait for a turn, ask the teacher, and wait for its answer."""
        async with self.queues[name].turn():
            return await run_in_threadpool(lambda: question(self._connect(name))())

    async def score(self, request: ScoreRequest) -> list[TopKSignals]:
        """The signals of a request's samples."""
        self.known(request.teacher)
        samples = []
        for index, row in enumerate(request.samples):
            try:
                samples += samples_of_row(row)
            except DataError as error:
                raise DataError(f"samples[{index}]: {error}") from None
        self._at_most(len(samples), "samples (assistant turns)")
        return await self.ask(request.teacher, lambda client: client.score(samples))

    async def generate(self, request: Sampling, conversations: Sequence[Turns]) -> list[str]:
        """An answer to each conversation."""
        self.known(request.model)
        self._at_most(len(conversations), "prompts")
        if request.max_tokens > self.http.max_new_tokens:
            raise DataError(f"max_tokens is {request.max_tokens}, at most {self.http.max_new_tokens} are allowed")
        samples = [Sample(messages, "") for messages in conversations]
        return await self.ask(
            request.model,
            lambda client: client.generate(
                samples,
                max_new_tokens=request.max_tokens,
                batch_size=len(samples),
                temperature=request.temperature,
                seed=request.seed,
            ),
        )

    def counted(
        self, request: Sampling, conversations: Sequence[Turns], answers: Sequence[str]
    ) -> tuple[list[str], dict[str, int]]:
        """Why each answer ended, and OpenAI's `usage`, in the teacher's own tokens."""
        renderer = self._renderer(request.model)
        read = sum(len(renderer.prompt_ids(Sample(messages, ""))) for messages in conversations)
        written = [len(renderer.tokenizer.encode(answer, add_special_tokens=False)) for answer in answers]
        reasons = ["length" if count >= request.max_tokens else "stop" for count in written]
        total = {"prompt_tokens": read, "completion_tokens": sum(written), "total_tokens": read + sum(written)}
        return reasons, total

    def known(self, name: str) -> None:
        """Raises UnknownTeacherError where there is no such teacher."""
        if name not in self.teachers:
            raise UnknownTeacherError(f"there is no teacher {name!r}; there are: {', '.join(self.teachers)}")

    def _at_most(self, count: int, what: str) -> None:
        if count > self.http.max_samples:
            raise DataError(
                f"the request has {count} {what}, at most {self.http.max_samples} are allowed; send several"
            )


class UnknownTeacherError(RayfuseError, LookupError):
    """A request names a teacher that is not served here."""


def build_app(front: Front) -> FastAPI:
    """The application, without the gate before it."""
    app = FastAPI(title="rayfuse teachers", version=__version__, docs_url=None, redoc_url=None)
    _routes(app, front)
    _descriptions(app, front)
    _faults(app)
    return app


def _routes(app: FastAPI, front: Front) -> None:
    @app.post("/score", response_model=ScoreResponse, responses={200: {"content": {SAFETENSORS: {}}}})
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Score texts: the teacher's top-K log-probabilities at every position of each response."""
        signals = await front.score(body)
        about = {"teacher": body.teacher, "fingerprint": front.teachers[body.teacher].fingerprint, "k": signals[0].k}
        if SAFETENSORS in request.headers.get("accept", ""):
            header = {name: str(value) for name, value in about.items()}
            return Response(save(pack(signals), metadata=header), media_type=SAFETENSORS)
        return Response(
            json.dumps({**about, "signals": [_as_lists(item) for item in signals]}), media_type="application/json"
        )

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> dict[str, Any]:
        """Complete prompts (OpenAI's form). Each prompt is read as one user turn in the teacher's chat template."""
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        conversations = [(Message("user", prompt),) for prompt in prompts]
        answers = await front.generate(body, conversations)
        reasons, usage = await run_in_threadpool(front.counted, body, conversations, answers)
        choices = [
            {"index": index, "text": answer, "finish_reason": reason, "logprobs": None}
            for index, (answer, reason) in enumerate(zip(answers, reasons, strict=True))
        ]
        return {**_head("cmpl", "text_completion", body.model), "choices": choices, "usage": usage}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> dict[str, Any]:
        """Continue a conversation (OpenAI's form)."""
        conversation = tuple(Message(message.role, message.content) for message in body.messages)
        answers = await front.generate(body, [conversation])
        reasons, usage = await run_in_threadpool(front.counted, body, [conversation], answers)
        message = {"role": "assistant", "content": answers[0]}
        choices = [{"index": 0, "message": message, "finish_reason": reasons[0], "logprobs": None}]
        return {**_head("chatcmpl", "chat.completion", body.model), "choices": choices, "usage": usage}


def _descriptions(app: FastAPI, front: Front) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The teachers that can be asked."""
        names = [{"id": name, "object": "model", "created": 0, "owned_by": "rayfuse"} for name in front.teachers]
        return {"object": "list", "data": names}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether this server answers."""
        return {"status": "ok"}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))


def _faults(app: FastAPI) -> None:
    """Every error as one JSON object, with the status that says whose fault it is."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'][1:]) or 'the body'}: {item['msg']}" for item in error.errors()
        ]
        return JSONResponse(fault("; ".join(lines), "invalid_request"), 422)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return JSONResponse(fault(str(error), "busy"), 429, {"retry-after": str(error.retry_after_s)})

    @app.exception_handler(RayfuseError)
    async def failed(_: Request, error: RayfuseError) -> JSONResponse:
        if isinstance(error, UnknownTeacherError):
            return JSONResponse(fault(str(error), "not_found"), 404)
        if isinstance(error, (DataError, AlignmentError)):
            return JSONResponse(fault(str(error), "invalid_request"), 422)
        if isinstance(error, TeacherGoneError):
            return JSONResponse(fault(str(error), "teacher_gone"), 503, {"retry-after": "30"})
        return JSONResponse(fault(str(error), "teacher_failed"), 502)


def _as_lists(signals: TopKSignals) -> dict[str, Any]:
    """Signals as JSON has them: lists, and null in place of NaN."""
    lse = signals.lse.tolist()
    return {
        "logps": signals.logps.astype(np.float32).tolist(),
        "ids": signals.ids.tolist(),
        "lse": [None if value != value else value for value in lse],
        "token_logps": signals.token_logps.tolist(),
        "byte_ends": signals.byte_ends.tolist(),
    }


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def docs_page(openapi: Mapping[str, Any]) -> str:
    """The OpenAPI description as one page of HTML that loads nothing from anywhere."""
    rows = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            fields = openapi.get("components", {}).get("schemas", {}).get(name, {}).get("properties", {})
            items = "".join(
                f"<li><code>{html.escape(key)}</code> {html.escape(str(field.get('description', '')))}</li>"
                for key, field in fields.items()
            )
            rows.append(
                f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation.get('description', ''))}</p>"
                f"<ul>{items}</ul>"
            )
    style = "body{font:16px/1.5 system-ui;max-width:46em;margin:2em auto;padding:0 1em}code{background:#eee}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>rayfuse teachers</title><style>{style}</style>"
        "<h1>rayfuse teachers</h1><p>Send <code>Authorization: Bearer TOKEN</code> with every request. "
        f"Machine-readable: <a href=openapi.json>openapi.json</a></p>{''.join(rows)}</html>"
    )
