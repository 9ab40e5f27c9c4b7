"""`rayfuse check`: everything that can be wrong before a run, found in seconds and reported all at once.

Each check is a function that yields what it found; a fault says what is wrong, with which value, and what to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from rayfuse.alignment import align, byte_ends
from rayfuse.config import Config, Model
from rayfuse.data import Sample, read_samples
from rayfuse.errors import RayfuseError
from rayfuse.models import (
    WEIGHT_FILES,
    context_length,
    is_causal_lm,
    load_model_config,
    load_tokenizer,
    vocabulary_size,
)
from rayfuse.render import Renderer
from rayfuse.store import SignalStore

FIRST_ROWS = 50
"""Rows of the data that are read, rendered and aligned by a check."""
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
    config = config.absolute()
    findings = list(chain.from_iterable(_guarded(config, *item) for item in CHECKS.items()))
    for finding in findings:
        mark = "[bold red]fault [/]" if finding.fault else "[yellow]remark[/]"
        console.print(f"{mark} [bold]{finding.where}[/]: ", end="")
        console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    faults = [finding for finding in findings if finding.fault]
    if not faults:
        console.print(f"[green]ok[/]     {', '.join(CHECKS)}: nothing stands in the way of this run")
    return faults


def _guarded(config: Config, name: str, check: Callable[[Config], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check(config)
    except RayfuseError as error:
        yield Finding(name, str(error))


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
        local = "://" not in config.store_url
        existed = local and Path(config.store_url).exists()
        SignalStore(config.store_url).check()
        if local and not existed:  # a check leaves nothing behind
            for folder in (Path(config.store_url), Path(config.output)):
                if folder.is_dir() and not any(folder.iterdir()):
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
    if where != "student" and config.signals.k > vocabulary:
        yield Finding(where, f"signals.k is {config.signals.k}, but this teacher has only {vocabulary} tokens")
    renderer = Renderer(tokenizer)
    if renderer.plain:
        yield Finding(where, "has no chat template; prompts are rendered as plain text", fault=False)
    context = context_length(model_config)
    if where == "student" and context is not None and config.data.max_length > context:
        yield Finding("data.max_length", f"{config.data.max_length} is more than the student's context of {context}")
    byte_ends(tokenizer, tokenizer.encode(PROBE, add_special_tokens=False))


def check_data(config: Config) -> Iterator[Finding]:
    """The first rows can be read, and every model renders and aligns them."""
    samples, counts = read_samples(config.data, first=FIRST_ROWS)
    if counts.bad_rows:
        yield Finding(
            "data", f"{counts.bad_rows} of the first {counts.rows} rows are malformed: {counts.first_bad}", fault=False
        )
    student = Renderer(load_tokenizer(config.student))
    rendered = []
    too_long = 0
    for sample in samples:
        item = student.render(sample)
        rendered.append(item)
        too_long += len(item.response_ids) >= config.data.max_length or (
            item.length > config.data.max_length and config.data.too_long == "drop"
        )
    if too_long == len(samples):
        yield Finding(
            "data.max_length", f"all of the first {len(samples)} samples are longer than {config.data.max_length}"
        )
    elif too_long:
        yield Finding("data.max_length", f"{too_long} of the first {len(samples)} samples are too long", fault=False)
    for index, teacher in enumerate(config.teachers):
        where = f"teachers.{index} ({teacher.name})"
        try:
            renderer = Renderer(load_tokenizer(teacher))
            context = context_length(load_model_config(teacher))
            for sample, item in zip(samples, rendered, strict=True):
                align(item.ends, renderer.render(sample, context).ends)
        except RayfuseError as error:
            yield Finding(where, f"{_short(sample)}: {error}")


def _short(sample: Sample) -> str:
    return f"sample {sample.key[:12]} ({sample.response!r:.40})"


def check_evaluation(config: Config) -> Iterator[Finding]:
    """The held-out items can be read and do not stand in the training data."""
    if config.evaluate is None:
        return
    from rayfuse.evaluate import read_items

    keys = {sample.key for sample in read_items(config.evaluate)}
    first, _ = read_samples(config.data, first=10_000)
    shared = sum(sample.key in keys for sample in first)
    if shared:
        yield Finding(
            "evaluate.path",
            f"{shared} of the first {len(first)} training samples are also evaluation items",
            fault=False,
        )


def check_machine(config: Config) -> Iterator[Finding]:
    """The GPUs that an embedded run asks for are there."""
    import torch

    if config.cluster.address not in (None, "local"):
        return
    wanted: list[tuple[str, Any]] = [("student.gpus", config.student.gpus * config.student.workers)]
    wanted += [(f"teachers.{i}.gpus", teacher.gpus) for i, teacher in enumerate(config.teachers)]
    there = torch.cuda.device_count()
    for where, gpus in wanted:
        if gpus > there:
            yield Finding(
                where, f"{gpus:g} GPUs are asked for, but this machine has {there}; lower it, or use a cluster"
            )


CHECKS: dict[str, Callable[[Config], Iterator[Finding]]] = {
    "output": check_output,
    "signals.store": check_store,
    "models": check_models,
    "data": check_data,
    "evaluate": check_evaluation,
    "machine": check_machine,
}
