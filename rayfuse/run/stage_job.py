"""From the configuration of a stage to the job that its workers get."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import rayfuse
from rayfuse.config import Config, Data, Model
from rayfuse.config.run import as_reference, as_teacher
from rayfuse.prepare.spec import INITIAL, PrepareSpec
from rayfuse.run.sources import UnitSource, source_name
from rayfuse.student.job import StageJob
from rayfuse.student.result import identity_of_model
from rayfuse.teachers.identity import IdentifiedTeacher, identify

NOT_OF_THE_STAGE = {"prefetch", "max_failures", "cpus", "save_dtype", "workers", "zero_stage", "offload"}
"""Keys of the student that change no stage's result, or only the order of sums in it; which model it is, its
fingerprint tells better than its path."""


def stage_job(
    config: Config,
    index: int,
    teachers: Sequence[IdentifiedTeacher],
    sources: Mapping[str, UnitSource],
    pivot: str | None = None,
) -> StageJob:
    """The job of stage `index`.

    Args:
        config: the run.
        index: which of `config.stages`.
        teachers: of the run, identified; a stage on preferences adds the model that it starts from.
        sources: the run's data, by the name of what a stage reads (sources.source_name).
        pivot: what `identify_pivot` says, where it is known already: the weights are hashed for it.

    Raises:
        CheckpointError: the stage starts from a stage that is not finished.
    """
    stage = config.stages[index]
    source_read = source_name(config, stage)
    source = sources[source_read]
    previous = index > 0 and stage.start_from == "previous"
    start = str(config.stage_folder(index - 1) / "model") if previous else config.student.model
    scorers = list(teachers) if stage.uses_teachers else []
    if stage.uses_preferences:
        scorers += identify([as_reference(config, INITIAL, start if previous else None)], config.signals.k)
    data = cast(Data, config.preferences) if stage.uses_preferences else config.data
    spec = PrepareSpec(
        student=config.student,
        teachers=tuple(scorers),
        store=config.store_url,
        k=stage.kept(config.signals.k),
        alignment=stage.meets_by,
        max_length=data.max_length,
        targets=stage.targets,
        stage=stage,
        on_missing=config.serving.on_missing,
    )
    made_of = {
        "code (rayfuse)": rayfuse.__version__,
        "settings": _settings(config, index, spec),
        source_read: source.content,
        **({f"weights of {source_read}": source.weights} if stage.weighs else {}),
        "student (the pivot)": pivot or identify_pivot(config),
        **{f"teacher {one.name}": one.fingerprint for one in scorers},
    }
    if previous:
        made_of["model of the stage before"] = identity_of_model(config.stage_folder(index - 1))
    return StageJob(
        config=config,
        index=index,
        start=start,
        identity=_hash(made_of),
        spec=spec,
        blocks=source.blocks,
        sizes=source.sizes,
        made_of=made_of,
    )


def _settings(config: Config, index: int, spec: PrepareSpec) -> str:
    """Hash of every key that changes the stage's result, and of none that does not."""
    stage, student = config.stages[index], config.student
    return _hash(
        [
            stage.model_dump(mode="json", exclude={"save_every": True, "keep": True, "merge": {"parallel"}}),
            student.model_dump(mode="json", exclude=NOT_OF_THE_STAGE | set(Model.model_fields) - {"dtype"}),
            [one.teacher.weight for one in spec.teachers],
            [spec.k, spec.on_missing, config.seed, index],
        ]
    )


def with_one_teacher(job: StageJob, teacher: IdentifiedTeacher) -> StageJob:
    """The job of one student of a pairwise stage. It depends on no other teacher: mending one costs it nothing."""
    own = f"teacher {teacher.name}"
    made_of = {name: value for name, value in job.made_of.items() if name == own or not name.startswith("teacher ")}
    spec = replace(job.spec, teachers=(teacher,))
    return replace(job, spec=spec, part=teacher.name, identity=_hash(made_of), made_of=made_of)


def identify_pivot(config: Config) -> str:
    """The pivot's fingerprint: weights, tokenizer and template. Every stage's result depends on it.

    Raises:
        ModelError: its files cannot be found.
    """
    (pivot,) = identify([as_teacher(config, "pivot")], config.signals.k)
    return pivot.fingerprint


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
