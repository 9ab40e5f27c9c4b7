"""Checks of the student and the teachers: they can be read, belong together and can answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayfuse.alignment.token_bytes import byte_ends
from rayfuse.check.data import FIRST_ROWS, FIRST_SAMPLES, fits
from rayfuse.check.finding import Finding
from rayfuse.config import Config, Model, Teacher
from rayfuse.data.render import Renderer
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.data.sample import Sample
from rayfuse.errors import DataError, ModelError, RayfuseError
from rayfuse.models.loading import (
    context_length,
    inspect_model,
    load_model_config,
    load_tokenizer,
    text_config,
    token_rows,
    valid_vocabulary,
    vocabulary_size,
)
from rayfuse.models.quantised import quantisation
from rayfuse.models.weight_files import some_of
from rayfuse.signals.store import SignalStore
from rayfuse.teachers.identity import identify

PROBE = "The answer is 12345.\n\nNaïve 世界 🙂"


def _models(config: Config) -> Iterator[tuple[str, Model]]:
    yield "student", config.student
    for index, teacher in enumerate(config.teachers):
        yield f"teachers.{index} ({teacher.name})", teacher


def check_models(config: Config) -> Iterator[Finding]:
    """Every model is a causal language model whose weights are safetensors and whose tokenizer belongs to it."""
    for where, model in _models(config):
        try:
            yield from _check_model(where, model, config)
        except RayfuseError as error:
            yield Finding(where, str(error))


def _check_model(where: str, model: Model, config: Config) -> Iterator[Finding]:
    if isinstance(model, Teacher) and model.backend in WITHOUT_WEIGHTS:
        yield from WITHOUT_WEIGHTS[model.backend](where, model, config)
        return
    folder = Path(model.model)
    if folder.is_absolute() or model.model.startswith("."):
        if not folder.is_dir():
            yield Finding(where, f"the folder {model.model} does not exist")
            return
        if model.gguf_file and not (folder / model.gguf_file).exists():
            yield Finding(where, f"{folder} has no file {model.gguf_file}")
            return
    if model.tokenizer and Path(model.tokenizer).is_absolute() and not Path(model.tokenizer).is_dir():
        yield Finding(where, f"the tokenizer's folder {model.tokenizer} does not exist")
        return
    model_config = load_model_config(model)
    yield from _check_weights(where, model, model_config)
    tokenizer = load_tokenizer(model)
    rows = int(text_config(model_config).vocab_size)
    vocabulary = valid_vocabulary(tokenizer, rows)
    if vocabulary < vocabulary_size(tokenizer):
        beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= rows)
        text = f"the model has no row for {some_of(beyond)}: they are never predicted, and a sample that needs one of "
        yield Finding(where, f"{text}them is left out", fault=False)
    if config.teachers and config.signals.k > vocabulary:
        yield Finding(where, f"signals.k is {config.signals.k}, but this model has only {vocabulary} tokens")
    renderer = Renderer(tokenizer, model.template, rows=rows)
    if renderer.plain:
        yield Finding(where, "has no chat template; prompts are rendered as plain text", fault=False)
    context = context_length(model_config)
    if where == "student" and context is not None and config.data.max_length > context:
        yield Finding("data.max_length", f"{config.data.max_length} is more than the student's context of {context}")
    byte_ends(tokenizer, tokenizer.encode(PROBE, add_special_tokens=False))


def _check_weights(where: str, model: Model, model_config: Any) -> Iterator[Finding]:
    """The weights can be loaded where they will be: by transformers, or by vLLM with transformers for the self-test."""
    engine = isinstance(model, Teacher) and model.backend == "vllm"
    if engine and quantisation(model_config) is not None:
        assert isinstance(model, Teacher)
        if model.parity.check:
            try:
                inspect_model(model)
            except ModelError as error:
                text = "vLLM may run these weights, but the self-test loads them with transformers"
                yield Finding(where, f"{text}: {error}; or set this teacher's parity: false to trust it unseen")
        return
    _, unread = inspect_model(model)
    if unread:
        text = f"{len(unread)} tensors in its files are not read: {some_of(unread)}"
        part = type(model_config) is not type(text_config(model_config))
        advice = "only the text model is loaded, and a student is saved without the rest" if part else "is it whole?"
        yield Finding(where, f"{text}; {advice}", fault=False)


def _check_endpoint(where: str, teacher: Teacher, config: Config) -> Iterator[Finding]:
    """The tokenizer is here, and the server passes the probe that every replica makes."""
    from rayfuse.teachers.openai.backend import OpenAITeacher

    yield from _check_tokenizer(where, teacher)
    OpenAITeacher(teacher, config.signals.k).close()


def _check_stored(where: str, teacher: Teacher, config: Config) -> Iterator[Finding]:
    """The first samples that the run will read have signals."""
    from rayfuse.prepare.targets import OF_VOCABULARIES
    from rayfuse.teachers.stored import missing_text

    if teacher.tokenizer is not None:
        yield from _check_tokenizer(where, teacher)
    else:
        for stage in config.stages:
            if not OF_VOCABULARIES.isdisjoint(stage.targets):
                text = "reads the teacher's tokens: set `tokenizer` to the folder of its tokenizer"
                yield Finding(where, f"{stage.method} {text}")
    store = SignalStore(config.store_url)
    (identified,) = identify([teacher], config.signals.k)
    with suppress(DataError):  # check_data says so
        samples = _first_read(config)
        missing = [sample for sample in samples if store.get(identified.fingerprint, sample.key) is None]
        if missing:
            first = missing_text(identified, store, missing[0])
            yield Finding(where, f"{len(missing)} of the first {len(samples)} samples are missing: {first}")


def _first_read(config: Config) -> list[Sample]:
    """The first samples that the stages with teachers will read: those that every model can, and that are not long."""
    from rayfuse.prepare.measure import measure

    kept: list[Sample] = []
    for sides in sorted({stage.sides for stage in config.stages if stage.uses_teachers}):
        if sides and config.preferences is not None:
            data = config.preferences
            groups = read_preferences(data, sides, first=FIRST_ROWS)[0][:FIRST_SAMPLES]
        else:
            data = config.data
            groups = [(sample,) for sample in read_samples(data, first=FIRST_ROWS)[0][:FIRST_SAMPLES]]
        sizes = iter(measure(config.student, config.teachers, [sample for group in groups for sample in group]))
        for group in groups:
            if all([fits(next(sizes), data) for _ in group]):
                kept += group
    return kept


def _check_tokenizer(where: str, teacher: Teacher) -> Iterator[Finding]:
    try:
        tokenizer = load_tokenizer(teacher)
    except ModelError as error:
        raise ModelError(f"{error}. Set `tokenizer` to a folder or hub id that has this teacher's tokenizer") from None
    if Renderer(tokenizer, teacher.template, rows=token_rows(teacher)).plain:
        yield Finding(where, "has no chat template; prompts are rendered as plain text", fault=False)
    byte_ends(tokenizer, tokenizer.encode(PROBE, add_special_tokens=False))


WITHOUT_WEIGHTS: dict[str, Callable[[str, Teacher, Config], Iterator[Finding]]] = {
    "openai": _check_endpoint,
    "store": _check_stored,
}
"""Backends that load no model here, and how their teachers are checked."""
