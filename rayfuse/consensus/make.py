"""A run's consensus: ask everybody, find out who is right, write what the stages learn from.

OUTPUT/consensus/candidates.jsonl   every prompt with its answers, who says the same, and p(right)
OUTPUT/consensus/choices.jsonl      `prompt` and `response` of the kept prompts: data for the stages
OUTPUT/consensus/pairs.jsonl        `prompt`, `chosen`, `rejected`: data for preference stages
OUTPUT/consensus/triples.jsonl      the same with `chosen_pivot`, for wrpo
OUTPUT/consensus/labels.jsonl       labels that are probably wrong, the most doubtful first
OUTPUT/consensus/summary.json       accuracies of the sources, share of wrong labels, findings
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rayfuse import cluster
from rayfuse.config import Config, Consensus, UnitTests
from rayfuse.config.run import as_teacher
from rayfuse.consensus.asking import Panel, answered, in_tasks, scored
from rayfuse.consensus.candidates import PIVOT, Candidates, read_candidates
from rayfuse.consensus.outcome import Decision, Outcome, decide
from rayfuse.consensus.outputs import doubtful_labels, pairs, responses, teacher_weights, triples
from rayfuse.consensus.scored import Scores
from rayfuse.data.sample import DataCounts
from rayfuse.errors import DataError
from rayfuse.evaluation.judges import JudgeActor
from rayfuse.files import write_whole
from rayfuse.prepare.units import form_units
from rayfuse.teachers.answers import AnswerStore, Author, Sampling
from rayfuse.teachers.identity import identify
from rayfuse.teachers.serving import applications

FOLDER = "consensus"
"""Where it is in a run folder."""


def make_consensus(config: Config, settings: Consensus, console: Console) -> Outcome:
    """Ask, decide and write; `config` is absolute and Ray is connected. Done again, it asks nothing twice.

    Raises:
        DataError: the data cannot be read, or no prompt has an answer to learn from.
        RayfuseError: a model cannot answer; what was answered is kept.
    """
    prompts, counts = read_candidates(config.data)
    units, counts = units_of(config, prompts, counts)
    authors = authors_of(config, settings)
    panel = Panel(
        authors,
        config.student,
        config.teachers,
        config.data,
        config.store_url,
        "wait" if config.serving.on_missing == "wait" else "fail",
    )
    silent = [teacher.name for teacher in config.teachers if teacher.stored is not None]
    console.print(
        f"consensus: {counts.samples:,} prompts, {sum(bool(one.labels) for one in prompts):,} with a label; asking "
        + ", ".join(author.model.name for author in authors),
        highlight=False,
    )
    AnswerStore(authors[0].store).check()
    with applications.borrowed([author.model for author in authors], config.signals.k, FOLDER):
        complete = gathered(answered, panel, units, settings)

        def scores(candidates: Sequence[Candidates]) -> list[Scores]:
            size = config.data.unit_size
            parts = [candidates[start : start + size] for start in range(0, len(candidates), size)]
            return gathered(scored, panel, parts, settings)

        outcome = decide(
            complete,
            equivalence=settings.equivalence,
            judge=tests_judge(settings.tests),
            score=scores,
            most_clusters=settings.clusters,
            silent=silent,
        )
    write(Path(config.output) / FOLDER, outcome, settings.keep, counts, [teacher.name for teacher in config.teachers])
    for line in summary_lines(outcome, settings.keep):
        console.print(line, highlight=False)
    return outcome


def units_of(
    config: Config, prompts: Sequence[Candidates], counts: DataCounts
) -> tuple[list[list[Candidates]], DataCounts]:
    """The prompts that every model can read, in units of similar length."""
    by_key = {one.prompt.sample.key: one for one in prompts}
    units, counts = form_units(config, config.data, [(one.prompt.sample,) for one in prompts], counts)
    return [[by_key[sample.key] for sample in unit] for unit in units.samples], counts


def authors_of(config: Config, settings: Consensus) -> tuple[Author, ...]:
    """Who answers: every teacher that is more than its stored signals, and the pivot; each once and greedily."""
    models = [teacher for teacher in config.teachers if teacher.stored is None]
    if settings.pivot:
        models.append(as_teacher(config, PIVOT).model_copy(update={"replicas": settings.replicas}))
    if not models:
        raise DataError("nobody answers: every teacher is only its stored signals, and consensus.pivot is false")
    store = settings.store or str(Path(config.output) / "answers")
    sampling = Sampling(count=1, temperature=0.0, max_new_tokens=settings.max_new_tokens, seed=0)
    return tuple(Author(model, sampling, store) for model in identify(models, config.signals.k))


def gathered(
    work: Callable[[Panel, Sequence[Candidates]], list[Any]],
    panel: Panel,
    units: Sequence[Sequence[Candidates]],
    settings: Consensus,
) -> list[Any]:
    """What `work` makes of all units, in their order whoever was first."""
    done = dict(in_tasks(work, panel, units, settings.in_flight))
    return [item for index in range(len(units)) for item in done[index]]


def tests_judge(settings: UnitTests) -> Callable[..., list[float]]:
    """Runs unit tests in an actor of its own, which starts when the first program is there."""

    def judge(programs: Sequence[Any]) -> list[float]:
        actor: Any = JudgeActor
        tester = actor.options(**cluster.judge_actor(settings)).remote(settings)
        scores: list[float] = ray.get(tester.score.remote(list(programs)))
        return scores

    return judge


# --- what is written and shown ------------------------------


def write(folder: Path, outcome: Outcome, keep: float, counts: DataCounts, teachers: Sequence[str]) -> None:
    """Write everything; `choices.jsonl` comes last, so that where it is the others are too. `teachers`: their names.

    Raises:
        DataError: no prompt has an answer to learn from.
    """
    rows = responses(outcome, keep, teachers)
    if not rows:
        reasons = (
            "; ".join(finding.text for finding in outcome.findings) or f"none is right with {keep} (consensus.keep)"
        )
        raise DataError(f"of {len(outcome.decisions)} prompts none has an answer to learn from: {reasons}")
    folder.mkdir(parents=True, exist_ok=True)
    weights = teacher_weights(outcome, teachers)
    _write_lines(folder / "candidates.jsonl", (_about(one, weights) for one in outcome.decisions))
    _write_lines(folder / "pairs.jsonl", pairs(outcome, keep))
    _write_lines(folder / "triples.jsonl", triples(outcome, keep))
    doubtful = doubtful_labels(outcome)
    _write_lines(
        folder / "labels.jsonl",
        (
            {
                "prompt": one.prompt.sample.plain_text,
                "label": one.label,
                "right": round(one.right, 6),
                "better": one.better,
                "sources": one.sources,
                "field": one.field,
            }
            for one in doubtful
        ),
    )
    write_whole(folder / "summary.json", json.dumps(summary_of(outcome, keep, counts), indent=2) + "\n")
    _write_lines(folder / "choices.jsonl", rows)


def summary(output: Path) -> dict[str, Any]:
    """The summary of a run's consensus, from its folder.

    Raises:
        DataError: the run has none.
    """
    path = output / FOLDER / "summary.json"
    if not path.exists():
        raise DataError(f"{output} has no consensus: its configuration has no `consensus` section, or it was not run")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def summary_of(outcome: Outcome, keep: float, counts: DataCounts) -> dict[str, Any]:
    """The summary, as JSON holds it."""
    chosen = [decision.chosen(keep) for decision in outcome.decisions]
    by_source: dict[str, int] = {}
    for answer in chosen:
        if answer is not None:
            by_source[answer.source] = by_source.get(answer.source, 0) + 1
    return {
        "rows read": counts.rows,
        "prompts": len(outcome.decisions),
        "kept": sum(by_source.values()),
        "wording of": dict(sorted(by_source.items())),
        "equivalence": asdict(outcome.equivalence),
        "fields": {"names": outcome.clusters[0], "given": outcome.clusters[1]},
        "wrong labels": None if outcome.wrong_labels is None else asdict(outcome.wrong_labels),
        "sources": [asdict(one) for one in outcome.estimates],
        "calibration": [asdict(one) for one in outcome.calibration],
        "shared mistakes": outcome.shared_mistakes,
        "findings": [asdict(one) for one in outcome.findings],
        "fell back": outcome.fell_back,
    }


def summary_lines(outcome: Outcome, keep: float) -> list[str]:
    """What a run prints: who is right how often, wrong labels, findings."""
    kept = sum(decision.chosen(keep) is not None for decision in outcome.decisions)
    lines = estimate_lines(outcome)
    lines.append(f"consensus: {kept:,} of {len(outcome.decisions):,} prompts have an answer to learn from")
    return lines + [f"consensus: {finding.text}" for finding in outcome.findings]


def estimate_lines(outcome: Outcome) -> list[str]:
    """How answers were compared, how often each source is right, and the share of wrong labels, in words."""
    shares = ", ".join(f"{one.source} {one.right:.0%}" for one in outcome.estimates if not one.field)
    lines = [
        f"consensus: answers compared by {outcome.equivalence.name} ({outcome.equivalence.reason})",
        f"consensus: estimated right: {shares}",
    ]
    wrong = outcome.wrong_labels
    if wrong is not None:
        lines.append(f"consensus: {wrong.right:.1%} of the labels are wrong ({wrong.low:.1%} to {wrong.high:.1%})")
    return lines


def _about(decision: Decision, weights: dict[str, dict[str, float]]) -> dict[str, Any]:
    one = decision.candidates
    answers = [
        {
            "source": answer.source,
            "text": answer.text,
            "certainty": answer.certainty,
            "group": decision.groups[index],
            "right": round(decision.right(index), 6),
            "weight": round(decision.weight(index), 6),
            **({"fault": answer.fault} if answer.fault else {}),
        }
        for index, answer in enumerate(one.answers)
    ]
    return {
        "key": one.prompt.sample.key,
        "prompt": one.prompt.sample.plain_text,
        "field": decision.field,
        "trusted": one.trusted,
        "none": round(decision.none, 6),
        "weights": {name: round(weight, 6) for name, weight in weights[one.prompt.sample.key].items()},
        "answers": answers,
    }


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    write_whole(
        path, b"".join(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n" for row in rows)
    )
