"""Who a teacher is: its fingerprint, and what is left in the store for others to know it by."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfuse.config import Model, Teacher
from rayfuse.config.public import public_name
from rayfuse.data.render import Renderer
from rayfuse.errors import ModelError
from rayfuse.models.loading import WEIGHT_FILES, context_length, load_model_config, load_tokenizer
from rayfuse.models.weight_files import INDEX, index_decides
from rayfuse.signals.store import SignalStore
from rayfuse.teachers.environments import engine_version


@dataclass(frozen=True)
class IdentifiedTeacher:
    """A teacher and the fingerprint of its answers: whom to ask, and where its signals are kept.

    Attributes:
        teacher: its configuration.
        fingerprint: see `fingerprint`.
    """

    teacher: Teacher
    fingerprint: str

    @property
    def name(self) -> str:
        """The teacher's name in the run."""
        return str(self.teacher.name)

    @property
    def live(self) -> bool:
        """Whether it is deployed and asked, and not only its stored signals."""
        return self.teacher.stored is None


def identify(teachers: Sequence[Teacher], k: int) -> tuple[IdentifiedTeacher, ...]:
    """The teachers with their fingerprints, in the same order. Files are hashed side by side.

    Raises:
        ModelError, TeacherError: as `fingerprint`.
    """
    with ThreadPoolExecutor(4) as pool:
        return tuple(pool.map(lambda teacher: IdentifiedTeacher(teacher, fingerprint(teacher, k)), teachers))


def live(teachers: Sequence[IdentifiedTeacher]) -> tuple[IdentifiedTeacher, ...]:
    """The teachers that are deployed and asked."""
    return tuple(teacher for teacher in teachers if teacher.live)


def describe(teachers: Sequence[IdentifiedTeacher], k: int, store: SignalStore) -> None:
    """Leave word in the store whose signals a fingerprint stands for, so that a `store` teacher can name them."""
    for one in teachers:
        about = {"name": one.name, "model": public_name(one.teacher.model), "backend": one.teacher.backend}
        store.describe(one.fingerprint, {**about, "k": k})


RENDERING = 1
"""Version of what render and the backends make of a sample; a change there that changes answers must raise it."""
CLOSED_RENDERING = 2
"""The same for templates whose prompt is taken from the closed conversation; see Renderer.prompt_text."""


def teacher_context(teacher: Teacher) -> int | None:
    """Tokens of prompt and response that a teacher reads: by its configuration, or as its server says.

    None where nobody tells. Stored signals have no limit of their own.
    """
    if teacher.backend == "store":
        return None
    if teacher.backend == "openai":
        from rayfuse.teachers.openai.probe import served

        return served(teacher).context
    length = context_length(load_model_config(teacher))
    if teacher.vllm is None:
        return length
    lengths = [item for item in (length, teacher.vllm.max_model_len) if item is not None]
    return min(lengths) - 1 if lengths else None  # the engine insists on room for a token that it writes


def fingerprint(teacher: Teacher, k: int) -> str:
    """The name of everything that a teacher's answers depend on: 32 hex digits.

    Weights (revision, or the hashes of the files), tokenizer, chat template and its arguments, context length, K, dtype
    and backend; of vLLM also its quantisation and version. For an endpoint, whose weights nobody here sees: its
    address, the model's name, `revision` and what the server calls the weights' origin; not the key, not the time, not
    the server's version or limits.

    Raises:
        ModelError: the model's files cannot be found.
        TeacherError: an endpoint does not answer, or does not serve the model.
    """
    if teacher.stored is not None:
        if teacher.stored.fingerprint is not None:
            return teacher.stored.fingerprint
        writer = {"backend": teacher.stored.backend, "stored": None}
        return fingerprint(teacher.model_copy(update=writer), k)
    tokenizer = load_tokenizer(teacher)
    parts: dict[str, Any] = {
        "weights": _weights_identity(teacher),
        "tokenizer": _sha(tokenizer.backend_tokenizer.to_str().encode()),
        "template": _sha(json.dumps(tokenizer.chat_template, sort_keys=True).encode()),
        "context": teacher_context(teacher),
        "k": k,
        "dtype": None if teacher.endpoint else teacher.dtype,
        "backend": teacher.backend,
        "ends": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "rendering": _rendering(tokenizer, teacher),
    }
    if teacher.autocast is not None:
        parts["autocast"] = teacher.autocast
    if teacher.template:
        parts["template_arguments"] = teacher.template
    if teacher.vllm is not None:
        parts["quantization"] = teacher.vllm.quantization
        parts["engine"] = engine_version(teacher)
    return _sha(json.dumps(parts, sort_keys=True).encode())[:32]


def _rendering(tokenizer: Any, teacher: Teacher) -> int:
    """The version of rendering: a later one only for templates that it reads otherwise than version 1 did."""
    renderer = Renderer(tokenizer, teacher.template)
    return CLOSED_RENDERING if renderer.opens_thought or renderer.closed else RENDERING


def _weights_identity(model: Teacher) -> str:
    if model.endpoint is not None:
        from rayfuse.teachers.openai.probe import served

        return json.dumps([model.endpoint.url, model.endpoint.model, model.revision, served(model).root])
    folder = Path(model.model)
    if not folder.is_dir():
        return f"{model.model}@{_hub_commit(model)}"
    names = [folder / model.gguf_file] if model.gguf_file else sorted(folder.glob(WEIGHT_FILES))
    files = [path for path in [*names, folder / "config.json"] if path.exists()]
    if not model.gguf_file and index_decides(folder):
        files.append(folder / INDEX)
    if model.trust_remote_code:
        files += sorted(folder.glob("*.py"))
    if not files:
        raise ModelError(f"{model.model} holds no weights ({model.gguf_file or WEIGHT_FILES})")
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_sha_file, files)
        return _sha("".join(f"{path.name}:{digest};" for path, digest in zip(files, hashes, strict=True)).encode())


def _hub_commit(model: Model) -> str:
    if model.revision and re.fullmatch(r"[0-9a-f]{40}", model.revision):
        return model.revision
    commit = getattr(load_model_config(model), "_commit_hash", None)
    if not commit:
        raise ModelError(f"cannot tell which commit of {model.model} is used; set `revision` to a commit hash")
    return str(commit)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
