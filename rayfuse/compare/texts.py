"""What teachers and pivot write on a seed's training prompts, and what is made of it.

Preference pairs: one answer of every teacher and two samples of the pivot; the exact verifier says which are right; a
right one is chosen, a wrong one rejected, and prompts with only one kind give no pair; `chosen_pivot` is the pivot's
own best, for WRPO. (InfiFPO: four and eight samples, a reward model.)

Teacher-written responses (SeqKD): the answer of a teacher drawn per prompt, or of the teacher that gave its own answer
the highest probability per token.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import ray

from rayfuse.compare.design import Condition, Plan
from rayfuse.compare.rows import Row, rows_name, training_rows, write_once
from rayfuse.config import Teacher
from rayfuse.data.sample import Message, Sample
from rayfuse.quickstart.world import EXPERTS, World
from rayfuse.teachers.transformers import TransformersTeacher

PIVOT_SAMPLES = 2


def texts_file(plan: Plan, work: Path, seed: int) -> Path:
    """Where everything that was written on a seed's prompts is."""
    return work / "texts" / f"{rows_name(plan, _largest(plan), seed)}.jsonl"


def _largest(plan: Plan) -> str:
    """The condition that holds the prompts of all others."""
    return max(plan.conditions, key=lambda name: plan.conditions[name].rows)


@ray.remote
def write_texts(plan: Plan, world: World, work: Path, seed: int) -> None:
    """Let every teacher answer all prompts greedily, and the pivot sample on those of the second half."""
    largest = plan.conditions[_largest(plan)]
    everything = _prompts(training_rows(largest, seed))
    second = _prompts(training_rows(largest, seed, "second"))
    rows: list[Row] = []
    for writer in EXPERTS:
        rows += _write(writer, world.teachers[writer], everything, plan, 0.0, seed)
    for number in range(PIVOT_SAMPLES):
        rows += _write("pivot", world.pivot, second, plan, plan.sizes.temperature, 1000 * (number + 1) + seed)
    write_once(rows, texts_file(plan, work, seed))


def _prompts(rows: list[Row]) -> list[str]:
    return sorted({row["prompt"] for row in rows})


def _write(writer: str, folder: Path, prompts: list[str], plan: Plan, temperature: float, seed: int) -> list[Row]:
    """One response of one model to each prompt, with its log-probability per token of the model's own."""
    backend = TransformersTeacher(Teacher(model=str(folder), name=writer, dtype="float32"), k=2)
    samples = [Sample((Message("user", prompt),), "-") for prompt in prompts]
    answers = backend.generate(
        samples, max_new_tokens=plan.sizes.max_new_tokens, batch_size=200, temperature=temperature, seed=seed
    )
    written = [replace(s, response=answer) for s, answer in zip(samples, answers, strict=True) if answer]
    signals = [s for i in range(0, len(written), 64) for s in backend.score(written[i : i + 64])]
    return [
        {
            "prompt": sample.messages[0].content,
            "writer": writer,
            "response": sample.response,
            "logp": float(answer.token_logps.mean()),
        }
        for sample, answer in zip(written, signals, strict=True)
    ]


def _read_texts(file: Path) -> dict[str, list[dict[str, Any]]]:
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_prompt[row["prompt"]].append(row)
    return by_prompt


def pairs_of(file: Path, condition: Condition, seed: int) -> list[Row]:
    """Preference pairs on the prompts of the second half; the condition's share of them is the wrong way round."""
    texts = _read_texts(file)
    draw = Random(f"pairs/{seed}")
    right_answers = {
        row["prompt"]: row["response"]
        for row in training_rows(condition.model_copy(update={"wrong": 0.0}), seed, "second")
    }
    pairs: list[Row] = []
    for prompt, answer in sorted(right_answers.items()):
        written = [row["response"] for row in texts[prompt]]
        right = [text for text in written if text.strip() == answer.strip()]
        wrong = [text for text in written if text.strip() != answer.strip()]
        if right and wrong:
            pair = {"prompt": prompt, "chosen": draw.choice(right), "rejected": draw.choice(wrong)}
            pairs.append({**pair, "chosen_pivot": _best_of_pivot(texts[prompt], pair)})
    for index in draw.sample(range(len(pairs)), round(len(pairs) * condition.wrong)):
        pair = pairs[index]
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        pair["chosen_pivot"] = pair["chosen"]
    return pairs


def _best_of_pivot(texts: list[dict[str, Any]], pair: Row) -> str:
    """The pivot's right sample, else a wrong one that is not the rejected, else the chosen response."""
    samples = [row["response"] for row in texts if row["writer"] == "pivot"]
    right = [text for text in samples if text.strip() == pair["chosen"].strip()]
    others = [text for text in samples if text != pair["rejected"]]
    return str((right or others or [pair["chosen"]])[0])


def responses_of(file: Path, condition: Condition, seed: int, half: str, surest: bool) -> list[Row]:
    """The rows' prompts with a teacher's answer in place of the response.

    Args:
        file: what the teachers wrote.
        condition: says which prompts.
        seed: of the rows.
        half: "all", "first" or "second".
        surest: the teacher that is surest of its answer; otherwise one drawn per prompt.
    """
    texts = _read_texts(file)
    draw = Random(f"responses/{seed}")
    rows: list[Row] = []
    for row in training_rows(condition, seed, half):
        answers = [text for text in texts[row["prompt"]] if text["writer"] != "pivot"]
        if answers:
            answer = max(answers, key=lambda text: text["logp"]) if surest else draw.choice(answers)
            rows.append({"prompt": row["prompt"], "response": answer["response"], "skill": row["skill"]})
    return rows
