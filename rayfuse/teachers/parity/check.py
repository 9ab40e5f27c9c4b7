"""Parity self-test: a run does not start on a teacher whose answers are not what its own weights say.

Each teacher scores a few fixed texts through its serving path (the Serve deployment and its backend), and a task scores
them with a plain float32 transformers forward (see reference). Too large a difference ends the run with the most likely
cause. A passed test is kept beside the teacher's signals, so each fingerprint is tested once per store.

    tolerance: mean |difference| of the log-probabilities of the kept K and of the next token, per text, in nats, beyond
    what storing float16 rounds away; the largest over the texts must not exceed TOLERANCE[dtype] * SLACK[backend].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from rayfuse import cluster
from rayfuse.cluster.failures import own_errors
from rayfuse.config import Model, Teacher
from rayfuse.data.render import Renderer
from rayfuse.data.sample import Message, Sample
from rayfuse.errors import ParityError, RayfuseError, TeacherError
from rayfuse.models.loading import WEIGHT_FILES, context_length, load_model_config, load_tokenizer
from rayfuse.signals.store import SignalStore
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher
from rayfuse.teachers.parity.diagnosis import diagnose
from rayfuse.teachers.parity.reference import Reference
from rayfuse.teachers.serving import applications
from rayfuse.teachers.serving.client import TeacherClient

log = logging.getLogger(__name__)
VERSION = 1
"""A change of the texts or of the comparison raises it: what passed before is then tested again."""
NOTE = "parity"
TOLERANCE = {"float32": 2e-4, "float16": 0.02, "bfloat16": 0.1}
QUANTISED = 0.5
"""Where the configuration asks for quantised weights; the reference has the whole ones."""
SLACK = {"transformers": 1.0, "vllm": 2.0, "openai": 2.0}
"""Engines with kernels of their own round in other places."""


def _probe(response: str, *turns: str) -> Sample:
    roles = ("user", "assistant") * len(turns)
    return Sample(tuple(map(Message, roles, turns)), response)


LONG = (
    "First we count what there is: 17 baskets with 24 apples each are 17 * 24 = 408 apples. Of these 36 are bruised, "
    "so 408 - 36 = 372 are left. They are sold in bags of 12, which makes 372 / 12 = 31 bags, at 3.50 each. "
    "Together that is 31 * 3.50 = 108.50. The answer is 108.50."
)
PROBES: dict[str, Sample] = {
    "short": _probe("Yes.", "Is water wet?"),
    "numbers": _probe("3.14159, -273.15, 1,000,000 and 0x1F4A9; 12345678 * 9 = 111111102.", "Write some numbers."),
    "code": _probe("def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))  # 5\n", "Write a function."),
    "latin": _probe("Fähren müßten über Öresund; naïve façade, señor, čeština, İstanbul.", "Accents, please."),
    "scripts": _probe("世界你好。こんにちは。 Привет, мир! שלום مرحبا नमस्ते 안녕", "Say hello in many languages."),
    "emoji": _probe("🙂👍🏽 👩‍👩‍👧 🇪🇺 ♥️ x²", "Only emoji."),
    "space": _probe("  two  spaces\n\n\n\ttabs\t\r\n end ", "Use white space."),
    "turns": _probe("It is 8, because 4 + 4 = 8.", "What is 2 + 2?", "It is 4.", "And twice that?"),
    "long": _probe(
        LONG, "17 baskets hold 24 apples each. 36 apples are bruised, 12 make a bag of 3.50. What is earned?"
    ),
}


def check_parity(
    teachers: Sequence[IdentifiedTeacher],
    k: int,
    store: SignalStore,
    console: Console,
    models: Sequence[Model] = (),
) -> None:
    """Test every teacher that has not passed yet, and remember those that pass.

    Args:
        teachers: live ones; those with `parity.check: false` are left out.
        k: kept logits.
        store: where a passed test is kept.
        console: gets one line per teacher that is tested.
        models: all models of the run, whose chat templates may have been mixed up.

    Raises:
        ParityError: a teacher's answers are not what its own weights say, with the most likely cause.
        TeacherError: a teacher does not answer, or there is no room for its reference forward.
    """
    todo = [one for one in teachers if one.teacher.parity.check and not _passed(store, one)]
    if not todo:
        return
    with applications.borrowed(todo, k, "parity"):
        _check(todo, store, console, models)


def _check(todo: Sequence[IdentifiedTeacher], store: SignalStore, console: Console, models: Sequence[Model]) -> None:
    probes = [_readable(one.teacher) for one in todo]
    waits = [TeacherClient(one).score(list(samples.values())) for one, samples in zip(todo, probes, strict=True)]
    templates = {model.model: _template(model) for model in models}
    judging = []
    for one, samples, wait in zip(todo, probes, waits, strict=True):
        answers = dict(zip(samples, wait(), strict=True))
        shared = not one.teacher.gpus and one.teacher.cpus <= 1
        task = (judge if shared else judge_alone).options(**cluster.parity_task(one.teacher))
        judging.append(task.remote(one.teacher, answers, templates) if has_weights(one.teacher) else None)
    for one, judged in zip(todo, judging, strict=True):
        record = _wait_for(one.teacher, judged) if judged is not None else {"reference": None, "difference": 0.0}
        store.put_note(one.fingerprint, NOTE, {"version": VERSION, "teacher": one.name, **record})
        console.print(_line(one.teacher, record), highlight=False)


def has_weights(teacher: Teacher) -> bool:
    """Whether the teacher's own weights can be loaded here: not those of a private endpoint."""
    return teacher.backend in ("transformers", "vllm") or any(Path(teacher.model).glob(WEIGHT_FILES))


def tolerance(teacher: Teacher) -> float:
    """Largest mean difference that is accepted, in nats."""
    if teacher.parity.tolerance is not None:
        return teacher.parity.tolerance
    if teacher.vllm is not None and teacher.vllm.quantization is not None:
        return QUANTISED
    return TOLERANCE[teacher.dtype] * SLACK.get(teacher.backend, 1.0)


def _passed(store: SignalStore, one: IdentifiedTeacher) -> bool:
    note = store.note(one.fingerprint, NOTE)
    if note is None or note.get("version") != VERSION:
        return False
    difference = note.get("difference")
    return isinstance(difference, float) and difference <= tolerance(one.teacher)


def _readable(teacher: Teacher) -> dict[str, Sample]:
    """The probes that the teacher's tokenizer keeps byte by byte, and whose response its context holds."""
    renderer = Renderer.of(teacher)
    context = context_length(load_model_config(teacher)) if has_weights(teacher) else None
    readable = {}
    for name, sample in PROBES.items():
        try:
            renderer.render(sample, context)
        except RayfuseError as error:
            log.info("parity: %s cannot read the probe %s: %s", teacher.name, name, error)
            continue
        readable[name] = sample
    if not readable:
        raise ParityError(
            f"teacher {teacher.name} can read none of the texts of the self-test; is its context too short?"
        )
    return readable


def _template(model: Model) -> str:
    template = load_tokenizer(model).chat_template
    return template if isinstance(template, str) else ""


def _wait_for(teacher: Teacher, judged: Any) -> dict[str, Any]:
    done, _ = ray.wait([judged], timeout=teacher.patience_s)
    if not done:
        ray.cancel(judged)
        raise TeacherError(
            f"teacher {teacher.name}: no room for the self-test's own forward within {teacher.patience_s:.0f} s "
            f"(it needs {teacher.cpus:g} CPUs and {teacher.gpus:g} GPUs beside the teacher); free some, or set its "
            "parity: false to trust it unseen"
        )
    try:
        with own_errors():
            record: dict[str, Any] = ray.get(judged)
    except RayTaskError as error:
        raise TeacherError(f"teacher {teacher.name}: its self-test failed: {error}") from error
    return record


def _line(teacher: Teacher, record: Mapping[str, Any]) -> str:
    if record["reference"] is None:
        return f"{teacher.name} answers; its weights are not here, so its answers are not compared"
    return (
        f"{teacher.name} says what its weights say: off by {record['difference']:.2g} nats at most, "
        f"{tolerance(teacher):g} allowed ({record['reference']['dtype']} reference on {record['reference']['device']})"
    )


def _judge(teacher: Teacher, answers: Mapping[str, TopKSignals], templates: Mapping[str, str]) -> dict[str, Any]:
    """`compare` as a task, where the memory for the teacher's weights is."""
    import torch

    torch.set_num_threads(max(1, int(teacher.cpus)))
    return compare(teacher, Reference(teacher, gpu=teacher.gpus > 0), answers, templates)


judge = ray.remote(_judge)
"""In a process that later tasks use too: its imports take longer than a small reference."""
judge_alone = ray.remote(max_calls=1)(_judge)
"""In a process of its own, which gives back a GPU's memory, and whose number of threads nobody inherits."""


def compare(
    teacher: Teacher, reference: Reference, answers: Mapping[str, TopKSignals], templates: Mapping[str, str]
) -> dict[str, Any]:
    """Hold the answers (by name of the probe) against the reference; what was found, for the record.

    Raises:
        ParityError: they differ by more than the tolerance.
    """
    for name, answer in answers.items():
        fault = reference.tokens_differ(PROBES[name], answer)
        if fault:
            raise ParityError(_message(teacher, "tokenizer", fault, f"in the probe {name!r}"))
    differences = {name: reference.difference(PROBES[name], answer) for name, answer in answers.items()}
    worst = max(differences, key=lambda name: differences[name].mean)
    largest = differences[worst].mean
    allowed = tolerance(teacher)
    if not largest <= allowed:
        found = diagnose(reference, [(PROBES[name], answer) for name, answer in answers.items()], templates, allowed)
        text = f"{found.text} (which leaves {found.after:.2g})" if found.cause != "weights" else found.text
        numbers = f"off by {largest:.2g} nats on average in the probe {worst!r}, {allowed:g} allowed"
        raise ParityError(_message(teacher, found.cause, text, f"{numbers}; {reference.dtype} reference"))
    return {
        "difference": largest,
        "tolerance": allowed,
        "reference": {"dtype": reference.dtype, "device": str(reference.device)},
        "probes": {name: {"mean": of.mean, "worst": of.worst, "top1": of.top1} for name, of in differences.items()},
        "left_out": sorted(set(PROBES) - set(answers)),
    }


def _message(teacher: Teacher, cause: str, text: str, numbers: str) -> str:
    return (
        f"teacher {teacher.name} ({teacher.model}, {teacher.backend}) does not say what its own weights say. "
        f"Most likely cause: {cause}. It {text} [{numbers}]. Mend it, raise its parity.tolerance, or set parity: false"
    )
