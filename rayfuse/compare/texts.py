"""What teachers and pivot answer to a world's training prompts, and what is made of it.

Responses: of one teacher (the surest of its own answer, one drawn, the one of the field, or what most of them say), or
of whoever the consensus finds right among labels and all answers (consensus/).

Preference pairs: among one answer of every teacher and two samples of the pivot a right one is chosen and a wrong one
rejected; prompts with only one kind give no pair; `chosen_pivot` is the pivot's own best, for WRPO. (InfiFPO: four and
eight samples, a reward model.) An exact verifier says what is right, or the consensus says what is probably right.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import ray

from rayfuse.compare.design import Condition, Method, Plan, WorldPlan
from rayfuse.compare.rows import Row, training_rows, write_once
from rayfuse.config import Teacher
from rayfuse.consensus import outputs
from rayfuse.consensus.candidates import LABEL, PIVOT, Answer, Candidates
from rayfuse.consensus.outcome import Outcome, decide
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Message, Sample
from rayfuse.quickstart.facts import FIELDS
from rayfuse.quickstart.world import World
from rayfuse.teachers.transformers import TransformersTeacher

PIVOT_SAMPLES = 2
Texts = Mapping[str, Sequence[Mapping[str, Any]]]
"""By prompt, what was written on it: rows with `writer`, `response` and `logp` (per token of the writer's own)."""


def texts_file(plan: Plan, work: Path, world: str) -> Path:
    """Where everything that was written on a world's prompts is."""
    sizes = plan.sizes
    name = f"{world}-{_hash(plan.worlds[world], sizes.max_new_tokens, sizes.temperature)}"
    return work / "texts" / f"{name}.jsonl"


def _hash(world: WorldPlan, *settings: Any) -> str:
    """Eight letters that are others for another world or other settings."""
    parts = [world.model_dump_json(exclude={"title", "tuned_in"}), *settings]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


@ray.remote
def write_texts(plan: Plan, key: str, world: World, work: Path) -> None:
    """Let every teacher and the pivot answer all prompts greedily, and the pivot sample besides."""
    condition = next(name for name, one in plan.conditions.items() if one.world == key)
    prompts = sorted(row["prompt"] for row in training_rows(plan, condition, 0))
    rows: list[Row] = []
    for writer, folder in {**world.teachers, PIVOT: world.pivot}.items():
        rows += _write(writer, folder, prompts, plan, 0.0, 0)
    for number in range(PIVOT_SAMPLES):
        rows += _write("sample", world.pivot, prompts, plan, plan.sizes.temperature, number + 1)
    write_once(rows, texts_file(plan, work, key))


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


def read_texts(file: Path) -> Texts:
    """What `write_texts` wrote."""
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_prompt[row["prompt"]].append(row)
    return by_prompt


def responses_for(method: Method, rows: Sequence[Row], everything: Sequence[Row], texts: Texts, seed: int) -> list[Row]:
    """What a method learns from: `prompt`, `response` and `skill`; prompts without a response are left out.

    Args:
        method: says where responses come from.
        rows: of `training_rows`, all or a half.
        everything: all of them, from which the consensus learns whom to believe.
        texts: what was written on the prompts.
        seed: draws a teacher per prompt, where one is drawn.
    """
    if method.learns_from == "labels":
        return [_row(row, row["response"]) for row in rows if "response" in row]
    if method.learns_from == "truth":
        return [_row(row, row["truth"]) for row in rows]
    if method.learns_from == "consensus":
        chosen = {row["provenance"]["prompt"]: row["response"] for row in outputs.responses(found(everything, texts))}
        return [_row(row, chosen[key]) for row in rows if (key := _prompt(row["prompt"]).sample.key) in chosen]
    draw, made = Random(f"responses/{seed}"), []
    for row in rows:
        answers = [text for text in texts.get(row["prompt"], ()) if text["writer"] in FIELDS]
        drawn = draw.randrange(len(FIELDS))
        if method.learns_from == "the field's teacher":
            answers = [text for text in answers if text["writer"] == row["skill"]]
        if not answers:
            continue
        if method.learns_from == "surest teacher":
            response = max(answers, key=lambda text: text["logp"])["response"]
        elif method.learns_from == "majority":
            response = _most_said([*answers, *texts_of(row)])
        else:
            response = answers[drawn % len(answers)]["response"]
        made.append(_row(row, response))
    return made


def texts_of(row: Row) -> list[dict[str, Any]]:
    """A row's label as one more answer; none where it has none."""
    return [{"writer": LABEL, "response": row["response"], "logp": float("-inf")}] if "response" in row else []


def _most_said(answers: Sequence[Mapping[str, Any]]) -> str:
    """The answer of most; among equals that of whoever is surest."""
    votes = Counter(answer["response"] for answer in answers)
    return str(max(answers, key=lambda answer: (votes[answer["response"]], answer["logp"]))["response"])


def found(rows: Sequence[Row], texts: Texts) -> Outcome:
    """Who is right among labels, teachers' and the pivot's own answers; fields are found, not given."""
    return decide(
        [
            Candidates(
                _prompt(row["prompt"]),
                (
                    *(Answer(LABEL, text["response"]) for text in texts_of(row)),
                    *(
                        Answer(text["writer"], text["response"], text["logp"])
                        for text in texts.get(row["prompt"], ())
                        if text["writer"] != "sample" and text["response"].strip()
                    ),
                ),
            )
            for row in rows
        ],
        equivalence="exact",
    )


def pairs_for(
    method: Method, condition: Condition, rows: Sequence[Row], everything: Sequence[Row], texts: Texts, seed: int
) -> list[Row]:
    """Preference pairs on the prompts of `rows`, by who says what is right; see `responses_for`.

    Of the verifier's the condition's share is the wrong way round.
    """
    if method.pairs_from == "consensus":
        made = {row["provenance"]["prompt"]: row for row in outputs.pairs(found(everything, texts))}
        keys = {row["prompt"]: _prompt(row["prompt"]).sample.key for row in rows}
        return [_pair(prompt, made[key], texts[prompt]) for prompt, key in keys.items() if key in made]
    draw, pairs = Random(f"pairs/{seed}"), []
    for row in sorted(rows, key=lambda row: row["prompt"]):
        written = [text["response"] for text in texts.get(row["prompt"], ())]
        right = [text for text in written if text.strip() == row["truth"].strip()]
        wrong = [text for text in written if text.strip() != row["truth"].strip()]
        if right and wrong:
            sides = {"chosen": draw.choice(right), "rejected": draw.choice(wrong)}
            pairs.append(_pair(row["prompt"], sides, texts[row["prompt"]]))
    for index in draw.sample(range(len(pairs)), round(len(pairs) * condition.wrong)):
        pair = pairs[index]
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        pair["chosen_pivot"] = pair["chosen"]
    return pairs


def _pair(prompt: str, sides: Row, texts: Sequence[Mapping[str, Any]]) -> Row:
    pair = {"prompt": prompt, "chosen": sides["chosen"], "rejected": sides["rejected"]}
    return {**pair, "chosen_pivot": _best_of_pivot(texts, pair)}


def _best_of_pivot(texts: Sequence[Mapping[str, Any]], pair: Row) -> str:
    """The pivot's sample that says what is chosen, else one that is not the rejected, else the chosen response."""
    samples = [row["response"] for row in texts if row["writer"] == "sample"]
    right = [text for text in samples if text.strip() == pair["chosen"].strip()]
    others = [text for text in samples if text != pair["rejected"]]
    return str((right or others or [pair["chosen"]])[0])


def _prompt(text: str) -> Prompt:
    return Prompt(Sample((Message("user", text),), ""))


def _row(row: Row, response: str) -> Row:
    return {"prompt": row["prompt"], "response": response, "skill": row["skill"]}
