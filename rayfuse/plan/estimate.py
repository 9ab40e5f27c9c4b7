"""What a run will need and take, put together: memory, store, tokens, hours, cost, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rayfuse.config import Config, Stage, Teacher
from rayfuse.config.run import as_reference
from rayfuse.errors import PlanError
from rayfuse.plan.choice import changes, choose, configured
from rayfuse.plan.hardware import Hardware
from rayfuse.plan.memory import Memory, Setup, on_host, student_activations, student_memory, teacher_memory
from rayfuse.plan.roofline import StepTime, scoring_seconds, step_time
from rayfuse.plan.shapes import Shape, read_shape
from rayfuse.plan.work import Work, count_samples, section_name, stage_data, stage_work, store_size

INITIAL = "initial"
"""What the plan calls the model that a preference stage starts from, which scores as a teacher does."""
PAPERS = {"sft": 145.0, "infifusion": 160.0, "infigfusion": 195.0, "infifpo": 58.0}
"""H800 hours of the papers for Phi-4 with three teachers (InfiFPO: five) and 130k samples of up to 4k tokens:
InfiFusion, arXiv 2501.02795; InfiGFusion, arXiv 2505.13893; InfiFPO, arXiv 2505.13878."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: number and method.
        work: steps, samples, tokens.
        setup: how its student is trained.
        students: how many, one after the other or side by side (pairwise stages).
        step: seconds of an optimiser step.
        scoring: device-seconds that each teacher works for answers that are not stored yet.
        hours: of the stage.
        devices: that it holds meanwhile.
        teachers_first: hours in which teachers alone work.
        paper: GPU hours of the paper, where the run is the paper's.
    """

    name: str
    work: Work
    setup: Setup
    students: int
    step: StepTime
    scoring: Mapping[str, float]
    hours: float
    devices: int
    teachers_first: float
    paper: float | None = None

    @property
    def device_hours(self) -> float:
        """Devices times hours, idle ones included."""
        return self.hours * self.devices


@dataclass(frozen=True)
class Plan:
    """A run as planned.

    Attributes:
        hardware: for what.
        student: sizes of the student.
        teachers: sizes by name.
        memories: of student ranks and replicas, each at its fullest.
        stages: in order.
        objects: of the store.
        store_bytes: of the store.
        host_bytes: a node's memory for what is offloaded.
        faults: what does not fit, and what to do.
        choice: overrides of the configuration that the plan would choose.
        chosen: the setting that they give, and its memory; None where nothing fits.
        length: mean student tokens of a sample.
        measured: whether `length` was given, and is not the longest.
    """

    hardware: Hardware
    student: Shape
    teachers: Mapping[str, Shape]
    memories: Sequence[Memory]
    stages: Sequence[StagePlan]
    objects: int
    store_bytes: float
    host_bytes: float
    faults: Sequence[str]
    choice: Mapping[str, Any]
    chosen: tuple[Setup, Memory] | None
    length: float
    measured: bool
    k: int = field(default=10)

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def device_hours(self) -> float:
        """Devices times hours, of all stages."""
        return sum(stage.device_hours for stage in self.stages)


def estimate(
    config: Config, hardware: Hardware, *, samples: int | None = None, length: float | None = None, fit: bool = False
) -> Plan:
    """Plan a run.

    Args:
        config: the run.
        hardware: what it is to run on.
        samples: rows of its data; default: as they can be counted from here.
        length: mean student tokens of a sample; default: the longest allowed, an upper bound.
        fit: plan with the chosen settings in place of the configured ones.

    Raises:
        PlanError: a model cannot be read, or the size of the data cannot be told.
    """
    student = read_shape(config.student)
    teachers = {str(one.name): one for one in _asked(config)}
    shapes = {name: read_shape(one) for name, one in teachers.items()}
    stages = list(config.stages)
    setups = {index: configured(config, stage) for index, stage in enumerate(stages)}
    chosen, choice = _choose(config, student, setups, hardware, length)
    if fit and chosen is not None:
        setups = {index: _with(setups[index], chosen[0], choice, config, stage) for index, stage in enumerate(stages)}
    memories = _memories(config, student, setups, teachers, shapes, hardware)
    plans = _stages(config, student, setups, teachers, shapes, hardware, samples, length)
    objects, stored = _store(config, plans, teachers)
    largest = max(setups.values(), key=lambda setup: on_host(student.trained, setup))
    return Plan(
        hardware=hardware,
        student=student,
        teachers=shapes,
        memories=memories,
        stages=plans,
        objects=objects,
        store_bytes=stored,
        host_bytes=on_host(student.trained, largest) * min(largest.workers, hardware.per_node),
        faults=_faults(config, memories, teachers, shapes, chosen, choice, hardware),
        choice=choice,
        chosen=chosen,
        length=length or max(stage_data(config, stage).max_length for stage in stages),
        measured=length is not None,
        k=config.signals.k,
    )


def _asked(config: Config) -> list[Teacher]:
    """Models that work here as teachers: of stored signals and of servers elsewhere there is nothing to plan."""
    local = [one for one in config.teachers if one.backend in ("transformers", "vllm")]
    needed = [*local] if any(stage.uses_teachers for stage in config.stages) or config.consensus else []
    if any(stage.uses_preferences for stage in config.stages):
        needed.append(as_reference(config, INITIAL).model_copy(update={"shape": config.student.shape}))
    return needed


def _choose(
    config: Config, student: Shape, setups: Mapping[int, Setup], hardware: Hardware, length: float | None
) -> tuple[tuple[Setup, Memory] | None, dict[str, Any]]:
    """What the plan would choose: by the stage that needs most, then units for the other section under that engine."""
    order = sorted(setups, key=lambda index: -student_memory(student, setups[index], hardware.device).total)
    chosen: tuple[Setup, Memory] | None = None
    keys: dict[str, Any] = {}
    for index in order:
        stage, setup = config.stages[index], setups[index]
        asked = setup if chosen is None else _with(setup, chosen[0], keys, config, stage)
        sides = max(1, len(stage.sides))
        found = choose(student, asked, hardware, sides, length or setup.length, fixed=chosen is not None)
        if found is None:
            return None, {}
        keys |= {key: value for key, value in changes(config, stage, found[0]).items() if key not in keys}
        chosen = found if chosen is None or found[1].total > chosen[1].total else chosen
    return chosen, keys


def _with(setup: Setup, chosen: Setup, keys: Mapping[str, Any], config: Config, stage: Stage) -> Setup:
    """A stage's setting with the chosen engine, recomputation and, where it is chosen already, unit size."""
    section = section_name(config, stage)
    units = keys.get(f"{section}.unit_size", stage_data(config, stage).unit_size)
    return replace(
        setup,
        engine=chosen.engine,
        zero_stage=chosen.zero_stage,
        offload=chosen.offload,
        checkpointing=chosen.checkpointing,
        batch=units * max(1, len(stage.sides)),
        micro_steps=max(1, stage.batch_size // units // setup.workers),
    )


def _memories(
    config: Config,
    student: Shape,
    setups: Mapping[int, Setup],
    teachers: Mapping[str, Teacher],
    shapes: Mapping[str, Shape],
    hardware: Hardware,
) -> list[Memory]:
    """The fullest student rank over the stages, and every teacher's replica."""
    ranks = []
    for index, setup in setups.items():
        memory = student_memory(student, setup, hardware.device)
        ranks.append(replace(memory, what=f"student rank, {index + 1:02d}-{config.stages[index].method}"))
    longest = max(setup.length for setup in setups.values())
    replicas = [teacher_memory(one, shapes[name], hardware.device, longest) for name, one in teachers.items()]
    return [max(ranks, key=lambda memory: memory.total), *replicas]


def _stages(
    config: Config,
    student: Shape,
    setups: Mapping[int, Setup],
    teachers: Mapping[str, Teacher],
    shapes: Mapping[str, Shape],
    hardware: Hardware,
    samples: int | None,
    length: float | None,
) -> list[StagePlan]:
    scored: dict[tuple[str, str], float] = {}
    plans = []
    for index, stage in enumerate(config.stages):
        setup = setups[index]
        mean = length or float(setup.length)
        work = stage_work(config, stage, samples or count_samples(config, stage), mean)
        acts = student_activations(student, setup)
        step = step_time(student, setup, hardware, acts, length=mean)
        section = section_name(config, stage)
        scoring: dict[str, float] = {}
        for name, teacher in teachers.items():
            if not (stage.uses_preferences if name == INITIAL else stage.uses_teachers):
                continue
            # The initial model is another one in every stage; a teacher's answers are in the store.
            known = (name if name != INITIAL else f"{name}/{index}", section)
            new = max(0.0, work.scored - scored.get(known, 0.0))
            scored[known] = max(work.scored, scored.get(known, 0.0))
            scoring[name] = scoring_seconds(teacher, shapes[name], hardware.device, new, mean)
        plans.append(_stage(config, index, work, setup, step, scoring, teachers, hardware, student))
    return plans


def _stage(
    config: Config,
    index: int,
    work: Work,
    setup: Setup,
    step: StepTime,
    scoring: Mapping[str, float],
    teachers: Mapping[str, Teacher],
    hardware: Hardware,
    student: Shape,
) -> StagePlan:
    stage = config.stages[index]
    students = len(config.teachers) if stage.pairwise is not None else 1
    training = work.steps * step.seconds * students
    held = {name: max(1.0, teachers[name].gpus) * teachers[name].replicas.max for name in scoring}
    alone = max((seconds / held[name] for name, seconds in scoring.items()), default=0.0)
    if config.serving.mode == "first" or not any(scoring.values()):
        devices = min(hardware.devices, max(setup.workers, round(sum(held.values()))))
        first = max(sum(scoring.values()) / devices, alone)
        seconds, used = training + first, max(setup.workers, devices if first else 0)
    else:
        first, seconds = 0.0, max(training, alone)
        used = setup.workers + round(sum(held.values()))
    same = student.parameters == 14_659_507_200 and len(config.teachers) >= 3 and student.name.endswith("phi-4")
    return StagePlan(
        name=f"{index + 1:02d}-{stage.method}",
        work=work,
        setup=setup,
        students=students,
        step=step,
        scoring=dict(scoring),
        hours=seconds / 3600,
        devices=used,
        teachers_first=first / 3600,
        paper=PAPERS.get(stage.method) if same else None,
    )


def _store(config: Config, plans: Sequence[StagePlan], teachers: Mapping[str, Teacher]) -> tuple[int, float]:
    """Objects and bytes: each text once for each teacher (stages on the same data share them)."""
    largest: dict[str, Work] = {}
    objects, stored = 0, 0.0
    for plan, stage in zip(plans, config.stages, strict=True):
        section = "preferences" if stage.uses_preferences else "data"
        if stage.uses_teachers and plan.work.scored > (largest[section].scored if section in largest else 0):
            largest[section] = plan.work
        if INITIAL in plan.scoring:
            count, size = store_size(config.signals.k, plan.work.samples * plan.work.sides, 1, plan.work.scored)
            objects, stored = objects + count, stored + size
    count_of = len([one for one in config.teachers if one.stored is None])
    for work in largest.values():
        count, size = store_size(config.signals.k, work.samples * work.sides, count_of, work.scored)
        objects, stored = objects + count, stored + size
    return objects, stored


def _faults(
    config: Config,
    memories: Sequence[Memory],
    teachers: Mapping[str, Teacher],
    shapes: Mapping[str, Shape],
    chosen: tuple[Setup, Memory] | None,
    choice: Mapping[str, Any],
    hardware: Hardware,
) -> list[str]:
    """What does not fit, and which setting would make it fit."""
    faults = []
    student, *replicas = memories
    if not student.fits:
        faults.append(f"{_too_large(student)}; {_student_advice(config, chosen, choice)}")
    longest = max(stage_data(config, stage).max_length for stage in config.stages)
    for memory in replicas:
        if not memory.fits:
            name = memory.what.removeprefix("teacher ")
            advice = _teacher_advice(teachers[name], shapes[name], hardware, longest)
            faults.append(f"{_too_large(memory)}; {advice}")
    asked = {"student.workers": float(config.student.workers)}
    copies = {name: max(1.0, one.gpus) * max(1, one.replicas.min) for name, one in teachers.items() if one.gpus}
    if config.serving.mode == "online" and hardware.device.cuda:
        asked |= copies
    total = sum(asked.values())
    most = max([total, *copies.values()]) if hardware.device.cuda else total
    if most > hardware.devices:
        advice = "lower them" if config.serving.mode == "first" else "lower them, or set serving.mode: first"
        faults.append(
            f"{most:g} devices are asked for at a time ({', '.join(f'{k} {v:g}' for k, v in asked.items())}), and "
            f"there are {hardware.devices}; {advice}"
        )
    return faults


def _too_large(memory: Memory) -> str:
    largest = memory.terms[0]
    return (
        f"{memory.what} needs {memory.total / 1e9:.1f} GB of {memory.room / 1e9:.1f} GB, most of it for {largest.name} "
        f"({largest.bytes / 1e9:.1f} GB)"
    )


def _student_advice(config: Config, chosen: tuple[Setup, Memory] | None, choice: Mapping[str, Any]) -> str:
    if chosen is None:
        return "no engine, unit size or recomputation makes it fit: more workers, shorter max_length, or larger GPUs"
    settings = ", ".join(f"{key}={value}" for key, value in choice.items())
    return f"it fits with {settings} ({chosen[1].total / 1e9:.1f} GB)"


def _teacher_advice(teacher: Teacher, shape: Shape, hardware: Hardware, longest: int) -> str:
    """The smallest change that makes a replica fit."""
    tries: list[tuple[str, Teacher]] = []
    tokens = teacher.batch_tokens
    while teacher.vllm is None and tokens > longest:
        tokens = max(longest, tokens // 2)
        tries.append((f"batch_tokens={tokens}", teacher.model_copy(update={"batch_tokens": tokens})))
    if teacher.vllm is not None:
        for split in (2, 4, 8):
            engine = teacher.vllm.model_copy(update={"tensor_parallel": split})
            changed = teacher.model_copy(update={"vllm": engine, "gpus": float(split)})
            tries.append((f"gpus={split} vllm.tensor_parallel={split}", changed))
    for setting, changed in tries:
        try:
            if teacher_memory(changed, shape, hardware.device, longest).fits:
                return f"it fits with {setting}"
        except PlanError:
            continue
    return "use backend: vllm with tensor_parallel, a smaller dtype, or larger GPUs"
