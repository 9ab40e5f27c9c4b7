"""Checks of everything that is read as rows: training data, preferences, prompts and evaluation items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rayfuse.check.finding import Finding
from rayfuse.config import Config, Data, RewardModel, UnitTests
from rayfuse.consensus.candidates import merged, parse_candidates
from rayfuse.consensus.outcome import LEAST_PROMPTS
from rayfuse.data.rows import Part, compared_parser, parse_samples, read_parts, read_samples
from rayfuse.data.sample import DataCounts, Sample, add_counts
from rayfuse.errors import AlignmentError, DataError, ModelError, TeacherError
from rayfuse.models.loading import (
    load_model_config,
    load_tokenizer,
    refuse_unloadable,
)
from rayfuse.prepare.weights import refuse_without_weights

if TYPE_CHECKING:
    from rayfuse.prepare.measure import Size

FIRST_ROWS = 10_000
"""Rows of the data that a check reads."""


FIRST_SAMPLES = 50
"""Samples of them that every model renders."""


SHOWN = 90
"""Characters of a rendered prompt's end, and of a response, that a check shows."""


def fits(size: Size, data: Data) -> bool:
    """Whether a run keeps a sample of this size."""
    return not size.fault and not size.too_long_for(data)


def check_data(config: Config) -> Iterator[Finding]:
    """The rows can be read, and every model reads the first samples, as the run itself will."""
    if config.consensus is not None:
        yield from _check_candidates(config)
        return
    parts = read_parts(config.data, FIRST_ROWS, parse_samples)
    yield from _as_read("data", parts)
    samples = [sample for part in parts for sample in part.items]
    counts = add_counts([part.counts for part in parts])
    yield from _check_weights(config, samples)
    yield from _check_samples(config, "data", config.data, samples[:FIRST_SAMPLES], counts)


def _check_weights(config: Config, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Rows carry the weights that stages read, where no consensus of the run makes them."""
    weighs = {kind for stage in config.stages for kind in stage.weighs}
    try:
        refuse_without_weights(samples, [teacher.name for teacher in config.teachers], weighs)
    except DataError as error:
        yield Finding("data", str(error))


def _check_candidates(config: Config) -> Iterator[Finding]:
    """The same where a consensus reads the data: rows may lack a response, and must be enough to learn from."""
    parts = read_parts(config.data, FIRST_ROWS, parse_candidates)
    yield from _as_read("data", parts)
    prompts = merged([item for part in parts for item in part.items])
    counts = add_counts([part.counts for part in parts])
    samples = [one.prompt.answered(one.labels[0].text if one.labels else "") for one in prompts[:FIRST_SAMPLES]]
    yield from _check_samples(config, "data", config.data, samples, counts)
    labels, trusted = sum(bool(one.labels) for one in prompts), sum(one.trusted for one in prompts)
    yield Finding(
        "consensus", f"{labels:,} of the first {len(prompts):,} prompts have a label, {trusted:,} a trusted one", False
    )
    for teacher in config.teachers:
        if teacher.stored is not None:
            yield Finding(
                "consensus", f"{teacher.name} is only its stored signals: it answers nothing, its weight is 0", False
            )
    silent = [teacher.name for teacher in config.teachers if teacher.stored is not None]
    for index, stage in enumerate(config.stages):
        if silent and "teachers" in stage.weighs:
            text = f"learns nothing from {', '.join(silent)}, which answer nothing and so have weight 0; for their"
            yield Finding(f"stages.{index}", f"{text} signals set teacher_weights: uniform", False)
    if len(prompts) < LEAST_PROMPTS:
        text = f"{len(prompts)} prompts are too few to learn who is right ({LEAST_PROMPTS} are needed)"
        yield Finding("consensus", f"{text}: the labels are learnt as they are", False)


def check_preferences(config: Config) -> Iterator[Finding]:
    """The same for the preference pairs, where a stage learns from them."""
    if config.preferences is None:  # a consensus makes the pairs
        return
    for sides in sorted({stage.sides for stage in config.stages if stage.sides}):
        parts = read_parts(config.preferences, FIRST_ROWS, compared_parser(sides))
        yield from _as_read("preferences", parts)
        groups = [group for part in parts for group in part.items][:FIRST_SAMPLES]
        samples = [sample for group in groups for sample in group]
        counts = add_counts([part.counts for part in parts])
        yield from _check_samples(config, "preferences", config.preferences, samples, counts)


def _as_read(where: str, parts: Sequence[Part[Any]]) -> Iterator[Finding]:
    """The form in which each data set was read, and what of it is not."""
    for part in parts:
        counts = part.counts
        forms = ", ".join(f"{count:,} as {form}" for form, count in counts.forms.items())
        weight = f", weight {part.source.weight:g}" if part.source.weight != 1 else ""
        unread = ", ".join(sorted(counts.unread)[:12]) + (" ..." if len(counts.unread) > 12 else "")
        text = f"{part.source.label}{weight}: rows read: {forms}"
        text += f"; not read: {unread}" if unread else ""
        text += f"; {counts.calling_turns:,} turns that call tools are context, not learned" * bool(
            counts.calling_turns
        )
        text += f"; {counts.context_turns:,} turns are marked as context, not learned" * bool(counts.context_turns)
        yield Finding(where, text, fault=False, note=True)


def _rendered(config: Config, where: str, sample: Sample) -> Iterator[Finding]:
    """A sample as each model reads it: the end of the prompt and the response, special tokens in them."""
    from rayfuse.prepare.measure import renderers

    with suppress(DataError, AlignmentError):  # _check_samples says so
        for name, renderer in renderers(config.student, config.teachers).items():
            rendered = renderer.render(sample)
            prompt, response = (renderer.tokenizer.decode(ids) for ids in (rendered.prompt_ids, rendered.response_ids))
            end = prompt if len(prompt) <= SHOWN else f"...{prompt[-SHOWN:]}"
            if len(response) > SHOWN:
                response = f"{response[: SHOWN // 2]} ... {response[-SHOWN // 2 :]}"
            yield Finding(f"{where} ({name})", f"{end!r} => {response!r}", fault=False, note=True)


def check_prefer(config: Config) -> Iterator[Finding]:
    """The prompts of `prefer` can be read and hold what the judge needs, and the judge can work here."""
    from rayfuse.data.prompts import read_prompts

    settings = config.prefer
    if settings is None:
        return
    where, data = ("prefer.prompts", settings.prompts) if settings.prompts else ("data", config.data)
    prompts, counts = read_prompts(data, settings.judge.needs if settings.judge else "", first=FIRST_ROWS)
    if settings.prompts:
        forms = ", ".join(f"{count:,} as {form}" for form, count in counts.forms.items())
        yield Finding(where, f"{data.label}: rows read: {forms}", fault=False, note=True)
        yield from _check_samples(config, where, data, [prompt.sample for prompt in prompts[:FIRST_SAMPLES]], counts)
    if isinstance(settings.judge, RewardModel):
        load_tokenizer(settings.judge)
        judge_config = load_model_config(settings.judge)
        refuse_unloadable(settings.judge, judge_config)
        labels = judge_config.num_labels
        if labels != 1 and settings.judge.label is None:
            yield Finding("prefer.judge.label", f"{settings.judge.model} has {labels} outputs; say which is the score")
    elif isinstance(settings.judge, UnitTests):
        from rayfuse.evaluation.sandbox import Limits, Sandbox

        Sandbox(Limits(), must_isolate=settings.judge.isolation == "namespaces")


def _check_samples(
    config: Config, where: str, data: Data, samples: list[Sample], counts: DataCounts
) -> Iterator[Finding]:
    from rayfuse.prepare.measure import STUDENT, measure

    if counts.bad_rows:
        yield Finding(
            where, f"{counts.bad_rows} of the first {counts.rows} rows are malformed: {counts.first_bad}", fault=False
        )
    try:
        sizes = measure(config.student, config.teachers, samples)
    except (ModelError, TeacherError):  # check_models says so
        return
    shown = next((sample for sample, size in zip(samples, sizes, strict=True) if fits(size, data)), samples[0])
    if shown.response:
        yield from _rendered(config, where, shown)
    too_long = [size.too_long_for(data) for size in sizes]
    faults = [
        f"{_short(sample)}: {size.fault}"
        for sample, size, model in zip(samples, sizes, too_long, strict=True)
        if size.fault and not model
    ]
    if faults:
        yield Finding(
            where,
            f"{len(faults)} of the first {len(samples)} samples cannot be read by every model, the first: {faults[0]}",
            fault=data.on_bad_row == "error" or len(faults) == len(samples),
        )
    every = all(too_long)
    for model, count in Counter(filter(None, too_long)).items():
        many = "all" if count == len(sizes) else str(count)
        advice = f"; raise it, or set {where}.too_long: cut" if every and data.too_long == "drop" else ""
        if model == STUDENT:
            limit, key = (
                f"{data.max_length} student tokens (the longest has {max(z.total for z in sizes)})",
                "max_length",
            )
        else:
            limit, key, advice = f"the context of {model}", "too_long", advice.replace("raise it, or ", "")
        text = f"{many} of the first {len(sizes)} samples are longer than {limit}{advice}"
        yield Finding(f"{where}.{key}", text, fault=every)


def _short(sample: Sample) -> str:
    return f"sample {sample.key[:12]} ({sample.response!r:.40})"


def _why(size: Size) -> str:
    """Why an evaluated model cannot read an item; empty where all can. Prompts may be cut; no item is dropped."""
    return size.fault or (f"the response is longer than the context of {size.never}" if size.never else "")


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
        faults = [
            f"{_short(item)}: {reason}" for item, size in zip(first, sizes, strict=True) if (reason := _why(size))
        ]
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
