"""All Ray options in one place: who gets which CPUs, GPUs, restarts and environment variables."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

import ray

from rayfuse.cluster.address import join
from rayfuse.cluster.embedded import ENVIRONMENT, QUIET, end_embedded, leave_serve, session, start_embedded
from rayfuse.config import Config, HostedJudge, Student, Teacher

__all__ = ["connect", "end_embedded", "leave_serve", "session", "start_embedded"]

PREPARE_CPUS = 0.01
"""A prepare task mostly waits for teachers and disks. It must never hold what a teacher needs to start; how many there
are is bounded by student.prefetch."""
SERVE_OVERHEAD_CPUS = 1.0
"""Serve's controller and Ray Train's controller."""


ROLE = "rayfuse-role"
"""Label of a node: `teachers` or `student`. Label the nodes of both, or none; a head is not labelled."""


def role_selector(role: str) -> dict[str, str]:
    """Ray's label selector by which teachers (`teachers`) or student ranks (`student`) find their nodes.

    Where nodes have the role, those; where only the other role is there (the nodes of this one may come yet), any node
    that does not have the other; where no node is labelled, all.
    """
    if not ray.is_initialized():
        return {}
    roles = {node.get("Labels", {}).get(ROLE) for node in ray.nodes() if node["Alive"]} - {None}
    other = {"teachers": "student", "student": "teachers"}[role]
    if role in roles:
        return {ROLE: role}
    return {ROLE: f"!{other}"} if other in roles else {}


def connect(config: Config) -> bool:
    """Connect to the cluster that the configuration or RAY_ADDRESS names, or start an embedded one.

    An embedded cluster offers as many logical CPUs as the run's actors ask for, so that a laptop runs what a cluster
    runs, only slower. The students of a pairwise stage ask for one student's, or for what merge.parallel says.

    Returns:
        True where this call started an embedded cluster, which ends with `session`, or with this process.

    Raises:
        ConfigError: no folder is short enough for the sockets of an embedded one.
        RayfuseError: the cluster does not answer within cluster.connect_s, or cannot be joined; an embedded one does
            not start.
    """
    if ray.is_initialized():
        return False
    os.environ.update({key: os.environ.get(key, value) for key, value in ENVIRONMENT.items()})
    runtime_env: dict[str, Any] = {"env_vars": {key: os.environ[key] for key in ENVIRONMENT}}
    if any(teacher.runtime_env is not None for teacher in config.teachers):
        # Another interpreter has its own packages, but must run this very code.
        runtime_env["py_modules"] = [str(Path(__file__).parents[1])]
    address, named_by = config.cluster.address, "cluster.address"
    if address in (None, "", "auto") and os.environ.get("RAY_ADDRESS"):  # Ray, too, lets it go before `auto`
        address, named_by = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    if address and address != "local":
        join(address, named_by, config.cluster.connect_s, runtime_env=runtime_env, **QUIET)
        return False
    start_embedded(_local_cpus(config), runtime_env=runtime_env)
    return True


def _local_cpus(config: Config) -> int:
    merges = [stage.pairwise for stage in config.stages if stage.pairwise is not None]
    at_once = max([min(merge.parallel or 1, len(config.teachers)) for merge in merges], default=1)
    students = max(at_once * _student_cpus(config.student), _prefer_cpus(config), _consensus_cpus(config))
    return max(os.cpu_count() or 1, math.ceil(_teacher_cpus(config) + students + SERVE_OVERHEAD_CPUS))


def _teacher_cpus(config: Config) -> float:
    return sum(teacher.cpus * teacher.replicas.max for teacher in config.teachers if teacher.stored is None)


def _prefer_cpus(config: Config) -> float:
    """What `rayfuse prefer` needs besides the teachers: the pivot answers and judges judge, while no student trains."""
    if config.prefer is None:
        return 0.0
    judge = config.prefer.judge
    judges = judge.cpus * judge.workers if isinstance(judge, HostedJudge) else 0.0
    tasks = config.prefer.in_flight * PREPARE_CPUS
    return config.student.cpus * config.prefer.replicas.max + judges + tasks


def _consensus_cpus(config: Config) -> float:
    """What the consensus needs besides the teachers: the pivot answers and tests run, while no student trains."""
    settings = config.consensus
    if settings is None:
        return 0.0
    pivot = config.student.cpus * settings.replicas.max if settings.pivot else 0.0
    return pivot + settings.tests.cpus * settings.tests.workers + settings.in_flight * PREPARE_CPUS


def _student_cpus(student: Student) -> float:
    return student.workers * (student.cpus + student.prefetch * PREPARE_CPUS)


def shortage(config: Config) -> str:
    """What the cluster has too little of for the student and one copy of each teacher; empty where they fit.

    With serving.mode first, teachers and student follow each other. Room on single nodes is not looked at.
    """
    there, student = ray.cluster_resources(), config.student
    asked = config.consensus is not None or any(stage.uses_teachers for stage in config.stages)
    live = [teacher for teacher in config.teachers if asked and teacher.stored is None]
    first = config.serving.mode == "first"
    student_needs = {"cpus": _student_cpus(student), "gpus": student.workers * student.gpus}
    short = []
    for name, key in (("CPU", "cpus"), ("GPU", "gpus")):
        teacher_needs = [getattr(teacher, key) * (1 if first else max(1, teacher.replicas.min)) for teacher in live]
        needed = max([student_needs[key], *teacher_needs]) if first else student_needs[key] + sum(teacher_needs)
        if needed > there.get(name, 0.0):
            short.append(f"{needed:g} {name}s where the cluster has {there.get(name, 0.0):g}")
    return " and ".join(short)


def students_at_once(config: Config) -> int:
    """Students of a pairwise stage that fit into what the cluster has free, at least one.

    The teachers keep room for all their replicas: students that took it would wait for teachers that cannot start.
    What the teachers hold already counts twice here, so this is rather too few than too many.
    """
    free, student = ray.available_resources(), config.student
    cpus = free.get("CPU", 0.0) - _teacher_cpus(config) - SERVE_OVERHEAD_CPUS
    fit = [cpus / _student_cpus(student)]
    if student.gpus:
        teachers = sum(teacher.gpus * teacher.replicas.max for teacher in config.teachers)
        fit.append((free.get("GPU", 0.0) - teachers) / (student.workers * student.gpus))
    return max(1, int(min(fit)))


def _in_shared_processes() -> dict[str, Any]:
    """Options by which a task of the driver runs in the processes that prepare tasks leave, and they in its.

    Each process imports for seconds, and Ray gives it to tasks of one runtime environment only. Those of the students
    inherit theirs as Ray Train wrote it, those of the driver as ray.init did: the same variables as another JSON, which
    Ray takes for another environment. Naming one of the variables makes Ray write it as Train does.
    """
    key = "RAY_TRAIN_V2_ENABLED"
    return {"runtime_env": {"env_vars": {key: os.environ.get(key, ENVIRONMENT[key])}}}


def prepare_task() -> dict[str, Any]:
    """Options of a prepare task: idempotent, so a lost worker or node only means doing it again."""
    return {"num_cpus": PREPARE_CPUS, "max_retries": 10}


def fill_task() -> dict[str, Any]:
    """Options of a task that fills the signal store before the student starts: a prepare task of the driver."""
    return prepare_task() | _in_shared_processes()


def coupling_task() -> dict[str, Any]:
    """Options of a task that solves a few graph couplings: milliseconds on a CPU while a student waits, so it must not
    queue behind a teacher's CPUs; deterministic, so a lost one is done again."""
    return {"num_cpus": PREPARE_CPUS, "max_retries": 10}


def measure_task() -> dict[str, Any]:
    """Options of a task that tokenizes a part of the data set."""
    return {"num_cpus": 1, "max_retries": 10, **_in_shared_processes()}


def judge_actor(judge: HostedJudge) -> dict[str, Any]:
    """Options of a judge's actor: idempotent, so a lost one is started again and asked again."""
    return {"num_cpus": judge.cpus, "num_gpus": judge.gpus, "max_restarts": 10, "max_task_retries": 10}


def evaluate_task(model: Teacher) -> dict[str, Any]:
    """Options of the evaluation of one model."""
    options = {"num_cpus": model.cpus, "num_gpus": model.gpus, "max_retries": 2}
    return options | (_in_shared_processes() if model.runtime_env is None else {"runtime_env": _own_environment(model)})


def _own_environment(teacher: Teacher) -> dict[str, Any]:
    """What a teacher's runtime environment changes, in Ray's form."""
    environment = teacher.runtime_env.as_ray() if teacher.runtime_env else {}
    if "py_executable" in environment:  # Ray reads it as a shell command
        environment["py_executable"] = shlex.quote(environment["py_executable"])
    return environment


def teacher_environment(teacher: Teacher) -> dict[str, Any]:
    """The run's own runtime environment with the teacher's changes: Serve lets a deployment inherit all or nothing."""
    inherited = dict(ray.get_runtime_context().runtime_env)
    changes = _own_environment(teacher)
    env_vars = {**inherited.get("env_vars", {}), **changes.get("env_vars", {})}
    return {**inherited, **changes, "env_vars": env_vars}


def parity_task(teacher: Teacher) -> dict[str, Any]:
    """Options of the plain forward that a teacher's answers are compared with."""
    return {"num_cpus": teacher.cpus, "num_gpus": min(teacher.gpus, 1.0), "max_retries": 2} | _in_shared_processes()


def teacher_deployment(teacher: Teacher, bounds: tuple[int, int] | None = None) -> dict[str, Any]:
    """Options of a teacher's Serve deployment.

    A replica computes one unit at a time and holds the next, so that it never waits for work; autoscaling follows the
    units in flight, from zero and back, between `bounds` (smallest and largest number of copies; default:
    teacher.replicas). One that is split over GPUs gets them on one node, by a placement group.
    """
    replicas = teacher.replicas
    low, high = bounds or (replicas.min, replicas.max)
    downscale_s = replicas.idle_s if replicas.downscale_s is None else replicas.downscale_s
    actor: dict[str, Any] = {"num_cpus": teacher.cpus, "num_gpus": teacher.gpus}
    if teacher.runtime_env is not None:
        actor["runtime_env"] = teacher_environment(teacher)
    where, group = role_selector("teachers"), dict[str, Any]()
    if teacher.gpus > 1:
        group["placement_group_bundles"] = [{"CPU": teacher.cpus, "GPU": teacher.gpus}]
        group["placement_group_strategy"] = "STRICT_PACK"
        if where:
            group["placement_group_bundle_label_selector"] = [where]
    elif where:
        actor["label_selector"] = where
    return {
        "ray_actor_options": actor,
        **group,
        "max_ongoing_requests": 4,
        "max_queued_requests": 1024,
        "max_constructor_retry_count": 2,
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 30,
        "autoscaling_config": {
            "min_replicas": low,
            "max_replicas": high,
            "target_ongoing_requests": 2,
            "upscale_delay_s": replicas.upscale_s,
            "downscale_delay_s": downscale_s,
            "downscale_to_zero_delay_s": replicas.idle_s,
            "metrics_interval_s": 2,
            "look_back_period_s": 5,
        },
    }


def student_group(student: Student) -> dict[str, Any]:
    """Arguments of the student group's ScalingConfig: on the students' nodes, on as few of them as can be."""
    resources: dict[str, float] = {"CPU": student.cpus}
    if student.gpus:
        resources["GPU"] = student.gpus
    group = {"num_workers": student.workers, "use_gpu": student.gpus > 0, "resources_per_worker": resources}
    where = role_selector("student")
    return {**group, "placement_strategy": "PACK", **({"label_selector": where} if where else {})}
