"""`rayfuse check`: everything that can be wrong before a run, found in seconds and reported all at once.

Each check is a function that yields what it found; a fault says what is wrong, with which value, and what to do.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rayfuse.alignment import byte_ends
from rayfuse.config import Config, Data, Model, RewardModel, Teacher, UnitTests
from rayfuse.data import DataCounts, Sample, read_preferences, read_samples
from rayfuse.environments import environment_fault
from rayfuse.errors import ConfigError, DataError, ModelError, RayfuseError, TeacherError
from rayfuse.models import (
    WEIGHT_FILES,
    context_length,
    fingerprint,
    is_causal_lm,
    load_model_config,
    load_tokenizer,
    vocabulary_size,
)
from rayfuse.render import Renderer
from rayfuse.store import SignalStore

if TYPE_CHECKING:
    from rayfuse.units import Size

FIRST_ROWS = 10_000
"""Rows of the data that a check reads."""
FIRST_SAMPLES = 50
"""Samples of them that every model renders."""
PATIENCE_S = 5.0
"""How long a check asks a server that does not answer; a run waits for its `patience_s`."""
PROBE = "The answer is 12345.\n\nNaïve 世界 🙂"


@dataclass(frozen=True)
class Finding:
    """One fault, or one remark that does not stop a run.

    Attributes:
        where: the key of the configuration it is about.
        text: what is wrong and what to do.
        fault: False for a remark.
    """

    where: str
    text: str
    fault: bool = True


def check_config(config: Config, console: Console) -> list[Finding]:
    """Run all checks, print what they find, and return the faults (empty: the run can start)."""
    config = _impatient(config.absolute())
    findings = list(chain.from_iterable(_guarded(config, *item) for item in CHECKS.items()))
    for finding in findings:
        mark = "[bold red]fault [/]" if finding.fault else "[yellow]remark[/]"
        console.print(f"{mark} [bold]{finding.where}[/]: ", end="")
        console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    faults = [finding for finding in findings if finding.fault]
    if not faults:
        console.print(f"[green]ok[/]     {', '.join(CHECKS)}: nothing stands in the way of this run", soft_wrap=True)
    return faults


def _guarded(config: Config, name: str, check: Callable[[Config], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check(config)
    except RayfuseError as error:
        yield Finding(name, str(error))


def _impatient(config: Config) -> Config:
    """The same, but a server that does not answer is not waited for, as a run would."""
    teachers = [
        teacher.model_copy(update={"patience_s": min(teacher.patience_s, PATIENCE_S)}) if teacher.endpoint else teacher
        for teacher in config.teachers
    ]
    return config.model_copy(update={"teachers": tuple(teachers)})


def _models(config: Config) -> Iterator[tuple[str, Model]]:
    yield "student", config.student
    for index, teacher in enumerate(config.teachers):
        yield f"teachers.{index} ({teacher.name})", teacher


def check_output(config: Config) -> Iterator[Finding]:
    """The run folder is new or of this configuration, writable, and the disk has room for models and checkpoints."""
    folder = Path(config.output)
    if (folder / "config.json").exists():
        yield Finding(
            "output", f"{folder} already holds a run; go on with --resume, or use another folder", fault=False
        )
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    if not existing.is_dir():
        yield Finding("output", f"{existing} is a file, so {folder} cannot be made; use another folder")
        return
    probe = existing / ".rayfuse-check"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield Finding("output", f"{existing} is not writable: {error}")
        return
    needed = sum(_disk_need(config, index) for index in range(len(config.stages)))
    free = shutil.disk_usage(existing).free
    if needed > free:
        yield Finding(
            "output",
            f"models and checkpoints need about {needed / 2**30:.1f} GiB, but {existing} has {free / 2**30:.1f} GiB "
            "free; free some, lower stages.N.keep, or use another folder",
        )


def _disk_need(config: Config, index: int) -> float:
    """Bytes of a stage: its model, and checkpoints of float32 weights with two moments."""
    folder = Path(config.student.model)
    names = [folder / config.student.gguf_file] if config.student.gguf_file else list(folder.glob(WEIGHT_FILES))
    weights = sum(path.stat().st_size for path in names if path.exists())
    stage = config.stages[index]
    checkpoints = stage.keep + 1 if stage.steps is None or stage.steps > stage.save_every else 0
    return weights * (2 + 6 * checkpoints)


def check_store(config: Config) -> Iterator[Finding]:
    """The signal store can be written and read."""
    if config.teachers:
        store = SignalStore(config.store_url)
        root = Path(store.root)
        made = [path for path in (root, *root.parents) if not path.exists()] if store.local else []
        try:
            store.check()
        finally:
            for folder in made:  # a check leaves nothing behind
                with suppress(OSError):
                    folder.rmdir()
    yield from ()


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
        if not model.gguf_file and not any(folder.glob(WEIGHT_FILES)):
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            yield Finding(where, f"{folder} has no {WEIGHT_FILES} (it has: {found}); pickled weights are refused")
    if model.tokenizer and Path(model.tokenizer).is_absolute() and not Path(model.tokenizer).is_dir():
        yield Finding(where, f"the tokenizer's folder {model.tokenizer} does not exist")
        return
    tokenizer = load_tokenizer(model)
    model_config = load_model_config(model)
    if not is_causal_lm(model_config):
        yield Finding(where, f"{model.model} ({model_config.model_type}) is not a causal language model")
        return
    vocabulary, rows = vocabulary_size(tokenizer), getattr(model_config, "vocab_size", None)
    if rows is not None and vocabulary > rows:
        yield Finding(
            where,
            f"the tokenizer has {vocabulary} tokens but the model predicts only {rows}: they do not belong together",
        )
    if config.teachers and config.signals.k > vocabulary:
        yield Finding(where, f"signals.k is {config.signals.k}, but this model has only {vocabulary} tokens")
    renderer = Renderer(tokenizer)
    if renderer.plain:
        yield Finding(where, "has no chat template; prompts are rendered as plain text", fault=False)
    context = context_length(model_config)
    if where == "student" and context is not None and config.data.max_length > context:
        yield Finding("data.max_length", f"{config.data.max_length} is more than the student's context of {context}")
    byte_ends(tokenizer, tokenizer.encode(PROBE, add_special_tokens=False))


def _check_endpoint(where: str, teacher: Teacher, config: Config) -> Iterator[Finding]:
    """The tokenizer is here, and the server passes the probe that every replica makes."""
    from rayfuse.teachers.openai import OpenAITeacher

    yield from _check_tokenizer(where, teacher)
    OpenAITeacher(teacher, config.signals.k).close()


def _check_stored(where: str, teacher: Teacher, config: Config) -> Iterator[Finding]:
    """The first samples that the run will read have signals."""
    from rayfuse.stages import METHODS
    from rayfuse.targets import OF_VOCABULARIES
    from rayfuse.teachers.store import missing_text

    if teacher.tokenizer is not None:
        yield from _check_tokenizer(where, teacher)
    else:
        for stage in config.stages:
            if not OF_VOCABULARIES.isdisjoint(METHODS[stage.method].targets):
                text = "reads the teacher's tokens: set `tokenizer` to the folder of its tokenizer"
                yield Finding(where, f"{stage.method} {text}")
    store, name = SignalStore(config.store_url), fingerprint(teacher, config.signals.k)
    with suppress(DataError):  # check_data says so
        samples = _first_read(config)
        missing = [sample for sample in samples if store.get(name, sample.key) is None]
        if missing:
            first = missing_text(teacher, name, store, missing[0])
            yield Finding(where, f"{len(missing)} of the first {len(samples)} samples are missing: {first}")


def _first_read(config: Config) -> list[Sample]:
    """The first samples that the stages with teachers will read: those that every model can, and that are not long."""
    from rayfuse.units import measure

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
            if all([_fits(next(sizes), data) for _ in group]):
                kept += group
    return kept


def _fits(size: Size, data: Data) -> bool:
    return not (
        size.fault or size.response >= data.max_length or (size.total > data.max_length and data.too_long == "drop")
    )


def _check_tokenizer(where: str, teacher: Teacher) -> Iterator[Finding]:
    try:
        tokenizer = load_tokenizer(teacher)
    except ModelError as error:
        raise ModelError(f"{error}. Set `tokenizer` to a folder or hub id that has this teacher's tokenizer") from None
    if Renderer(tokenizer).plain:
        yield Finding(where, "has no chat template; prompts are rendered as plain text", fault=False)
    byte_ends(tokenizer, tokenizer.encode(PROBE, add_special_tokens=False))


WITHOUT_WEIGHTS: dict[str, Callable[[str, Teacher, Config], Iterator[Finding]]] = {
    "openai": _check_endpoint,
    "store": _check_stored,
}
"""Backends that load no model here, and how their teachers are checked."""


def check_data(config: Config) -> Iterator[Finding]:
    """The rows can be read, and every model reads the first samples, as the run itself will."""
    samples, counts = read_samples(config.data, first=FIRST_ROWS)
    yield from _check_samples(config, "data", config.data, samples[:FIRST_SAMPLES], counts)


def check_preferences(config: Config) -> Iterator[Finding]:
    """The same for the preference pairs, where a stage learns from them."""
    for sides in sorted({stage.sides for stage in config.stages if stage.sides}):
        assert config.preferences is not None
        compared, counts = read_preferences(config.preferences, sides, first=FIRST_ROWS)
        samples = [sample for group in compared[:FIRST_SAMPLES] for sample in group]
        yield from _check_samples(config, "preferences", config.preferences, samples, counts)


def check_prefer(config: Config) -> Iterator[Finding]:
    """The prompts of `prefer` can be read and hold what the judge needs, and the judge can work here."""
    from rayfuse.prompts import read_prompts

    settings = config.prefer
    if settings is None:
        return
    where, data = ("prefer.prompts", settings.prompts) if settings.prompts else ("data", config.data)
    prompts, counts = read_prompts(data, settings.judge.needs if settings.judge else "", first=FIRST_ROWS)
    if settings.prompts:
        yield from _check_samples(config, where, data, [prompt.sample for prompt in prompts[:FIRST_SAMPLES]], counts)
    if isinstance(settings.judge, RewardModel):
        load_tokenizer(settings.judge)
        labels = load_model_config(settings.judge).num_labels
        if labels != 1 and settings.judge.label is None:
            yield Finding("prefer.judge.label", f"{settings.judge.model} has {labels} outputs; say which is the score")
    elif isinstance(settings.judge, UnitTests):
        from rayfuse.sandbox import Limits, Sandbox

        Sandbox(Limits(), must_isolate=settings.judge.isolation == "namespaces")


def _check_samples(
    config: Config, where: str, data: Data, samples: list[Sample], counts: DataCounts
) -> Iterator[Finding]:
    from rayfuse.units import measure

    if counts.bad_rows:
        yield Finding(
            where, f"{counts.bad_rows} of the first {counts.rows} rows are malformed: {counts.first_bad}", fault=False
        )
    try:
        sizes = measure(config.student, config.teachers, samples)
    except (ModelError, TeacherError):  # check_models says so
        return
    faults = [f"{_short(sample)}: {size.fault}" for sample, size in zip(samples, sizes, strict=True) if size.fault]
    if faults:
        yield Finding(
            where,
            f"{len(faults)} of the first {len(samples)} samples cannot be read by every model, the first: {faults[0]}",
            fault=data.on_bad_row == "error" or len(faults) == len(samples),
        )
    limit = data.max_length
    sizes = [size for size in sizes if not size.fault]
    long = [size for size in sizes if not _fits(size, data)]
    if long:
        every = len(long) == len(sizes)
        advice = f"; raise it, or set {where}.too_long: cut" if every and data.too_long == "drop" else ""
        yield Finding(
            f"{where}.max_length",
            f"{'all' if every else len(long)} of the first {len(sizes)} samples are longer than {limit} student tokens"
            f" (the longest has {max(size.total for size in long)}){advice}",
            fault=every,
        )


def _short(sample: Sample) -> str:
    return f"sample {sample.key[:12]} ({sample.response!r:.40})"


def check_evaluation(config: Config) -> Iterator[Finding]:
    """The held-out items can be read by every model that is evaluated, and do not stand in the training data."""
    if config.evaluate is None:
        return
    from rayfuse.evaluate import read_items
    from rayfuse.units import measure

    items = read_items(config.evaluate)
    first = items[:FIRST_SAMPLES]
    with suppress(ModelError, TeacherError):  # check_models says so
        sizes = measure(config.student, config.teachers if config.evaluate.teachers else (), first)
        faults = [f"{_short(item)}: {size.fault}" for item, size in zip(first, sizes, strict=True) if size.fault]
        if faults:
            yield Finding("evaluate.path", f"a model cannot read an item: {faults[0]}")
    keys = {item.key for item in items}
    with suppress(DataError):  # check_data says so
        samples, _ = read_samples(config.data.model_copy(update={"on_bad_row": "skip"}), first=FIRST_ROWS)
        shared = sum(sample.key in keys for sample in samples)
        if shared:
            yield Finding(
                "evaluate.path",
                f"{shared} of the first {len(samples)} training samples are also evaluation items",
                fault=False,
            )


def check_machine(config: Config) -> Iterator[Finding]:
    """The GPUs that an embedded run asks for are there."""
    import torch

    if (config.cluster.address or os.environ.get("RAY_ADDRESS") or "local") != "local":
        return
    wanted: dict[str, float] = {"student.gpus": config.student.gpus * config.student.workers}
    wanted |= {f"teachers.{i}.gpus": teacher.gpus for i, teacher in enumerate(config.teachers)}
    there = torch.cuda.device_count()
    missing = {where: gpus for where, gpus in wanted.items() if gpus > there}
    together = config.serving.mode == "online"  # otherwise teachers and student take turns
    if not missing and together and sum(wanted.values()) > there:
        missing = {"student.gpus, teachers.N.gpus": sum(wanted.values())}
    for where, gpus in missing.items():
        yield Finding(where, f"{gpus:g} GPUs are asked for, but this machine has {there}; lower it, or use a cluster")


def check_environments(config: Config) -> Iterator[Finding]:
    """Every teacher's own interpreter runs, has the run's versions of Python and Ray, and the engine."""
    local = (config.cluster.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    for index, teacher in enumerate(config.teachers):
        try:
            fault = environment_fault(teacher, local=local)
        except ConfigError as error:
            fault = str(error)
        if fault:
            yield Finding(f"teachers.{index}.runtime_env ({teacher.name})", fault)


def check_serving(config: Config) -> Iterator[Finding]:
    """Every stage can go on without a teacher, where it may have to; and HTTP has its token."""
    from rayfuse.http.gate import read_token
    from rayfuse.stages import METHODS

    if config.serving.on_missing == "drop":
        for index, stage in enumerate(config.stages):
            if stage.uses_teachers and not METHODS[stage.method].partial:
                able = ", ".join(name for name, method in METHODS.items() if method.partial)
                yield Finding(
                    "serving.on_missing",
                    f"stages.{index} ({stage.method}) cannot go on without one of its teachers; use wait or fail (drop "
                    f"works for {able})",
                )
    if config.serving.http is not None:
        read_token(config.serving.http)


CHECKS: dict[str, Callable[[Config], Iterator[Finding]]] = {
    "output": check_output,
    "signals.store": check_store,
    "models": check_models,
    "data": check_data,
    "preferences": check_preferences,
    "prefer": check_prefer,
    "evaluate": check_evaluation,
    "machine": check_machine,
    "environments": check_environments,
    "serving": check_serving,
}
