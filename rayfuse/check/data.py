"""Checks of everything that is read as rows: training data, preferences, prompts and evaluation items."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from rayfuse.config import Config, Data, RewardModel, UnitTests
from rayfuse.data.rows import read_preferences, read_samples
from rayfuse.data.sample import DataCounts, Sample
from rayfuse.errors import DataError, ModelError, TeacherError
from rayfuse.models.loading import (
    load_model_config,
    load_tokenizer,
)

if TYPE_CHECKING:
    from rayfuse.prepare.measure import Size
from rayfuse.check.finding import Finding

FIRST_ROWS = 10_000
"""Rows of the data that a check reads."""


FIRST_SAMPLES = 50
"""Samples of them that every model renders."""


def fits(size: Size, data: Data) -> bool:
    return not (
        size.fault or size.response >= data.max_length or (size.total > data.max_length and data.too_long == "drop")
    )


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
    from rayfuse.data.prompts import read_prompts

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
        from rayfuse.evaluation.sandbox import Limits, Sandbox

        Sandbox(Limits(), must_isolate=settings.judge.isolation == "namespaces")


def _check_samples(
    config: Config, where: str, data: Data, samples: list[Sample], counts: DataCounts
) -> Iterator[Finding]:
    from rayfuse.prepare.measure import measure

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
    long = [size for size in sizes if not fits(size, data)]
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
    from rayfuse.evaluation.models import read_items
    from rayfuse.prepare.measure import measure

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
