"""What the reliability model is worth: a student on labels, on the surest teacher's answers, on the chosen ones.

    python jobs/bench/consensus.py --cache /tmp/facts --seeds 0 1

Three fields of facts (quickstart/facts.py), three experts and a pivot with the quickstart's tokenizers, plain torch on
one core: no Ray. The models are made once per world and kept in the cache. One line per method: held-out questions
that the student answers, by seed, and the share of prompts whose kept text is right. With --choose nobody is trained:
one line per way to choose a text (choosers.py, crowd-kit's among them) and setting, the percent of prompts whose text
is right.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choosers import PEERS, Texts, oracle, share_right  # beside this file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.consensus.candidates import Answer, Candidates
from rayfuse.consensus.clusters import k_means
from rayfuse.consensus.equivalence import Grouping, exact
from rayfuse.consensus.outcome import decide
from rayfuse.consensus.outputs import responses
from rayfuse.consensus.scored import fit_scores
from rayfuse.data.prompts import Prompt
from rayfuse.data.sample import Sample
from rayfuse.quickstart import facts, tiny_models
from rayfuse.quickstart.facts_world import STYLES, Knowledge, make_model

EXPERTS = facts.FIELDS
"""Each expert is named by its field."""
WORLDS = {"f0": Knowledge(), "f1": Knowledge(0.4, 0.3, 0.15), "f2": Knowledge(0.25, 0.3, 0.4)}


def make_models(knowledge: Knowledge, folder: Path, seed: int, steps: int) -> None:
    """Train the four models of a world, for `steps` of 32 samples, where they are not there yet."""
    for name in STYLES:
        if not (folder / name / "config.json").exists():
            begun = time.process_time()
            make_model(name, seed, folder / name, knowledge, steps)
            print(f"{folder.name}/{name}: made in {time.process_time() - begun:.0f} s of processor time", flush=True)


class Model:
    """A saved model that answers, says how sure it is, and learns."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)

    def answers(self, prompts: list[str]) -> list[str]:
        """Greedy answers."""
        return tiny_models.answers(self.model, self.tokenizer, prompts)

    @torch.inference_mode()
    def certainties(self, prompts: list[str], texts: list[str]) -> list[float]:
        """Mean log-probability per own token of each text, end of turn included."""
        rows = [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, texts, strict=True)]
        samples = tiny_models.encode(self.tokenizer, rows)
        found = []
        for start in range(0, len(samples), 256):
            ids_BT, labels_BT = tiny_models._padded(samples[start : start + 256])
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
            counts_BT = labels_BT != tiny_models.IGNORED
            logps_BT = logits_BTV.log_softmax(-1).gather(-1, labels_BT.clamp_min(0)[..., None])[..., 0] * counts_BT
            found += (logps_BT.sum(1) / counts_BT.sum(1)).tolist()
        return found

    def learn(self, rows: list[dict[str, Any]], steps: int, rate: float, seed: int) -> Model:
        """Plain fine-tuning, in place."""
        samples = tiny_models.encode(self.tokenizer, rows)
        tiny_models.train(self.model, samples, steps=steps, batch=32, learning_rate=rate, seed=seed)
        return self


def asked(folder: Path, prompts: list[str]) -> dict[str, list[Answer]]:
    """Every model's own answer to each prompt, by model."""
    found = {}
    for name in (*EXPERTS, "pivot"):
        model = Model(folder / name)
        texts = model.answers(prompts)
        certainties = model.certainties(prompts, [text or " " for text in texts])
        found[name] = [
            Answer(name, text, certainty, fault="" if text.strip() else "empty")
            for text, certainty in zip(texts, certainties, strict=True)
        ]
    return found


def candidates(rows: list[dict[str, Any]], answers: dict[str, list[Answer]]) -> list[Candidates]:
    """Labels and models' answers, without the field: it has to be found."""
    return [
        Candidates(
            Prompt(Sample((("user", row["prompt"]),), "")),
            (
                *((Answer("label", row["response"]),) if "response" in row else ()),
                *(of_model[index] for of_model in answers.values() if of_model[index].text.strip()),
            ),
        )
        for index, row in enumerate(rows)
    ]


def surest(rows: list[dict[str, Any]], answers: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    """Each prompt with the answer of the teacher that is surest of its own."""
    made = []
    for index, row in enumerate(rows):
        best = max((answers[name][index] for name in EXPERTS), key=lambda answer: answer.certainty or 0.0)
        made += [{"prompt": row["prompt"], "response": best.text}] if best.text.strip() else []
    return made


def choose_free(folder: Path, asked: list[Candidates], truth: dict[str, str]) -> list[tuple[str, float, str]]:
    """(how, percent of prompts whose chosen text is right, note) where every text is a candidate of its own."""
    pairs = list(dict.fromkeys((one.prompt.sample.plain_text, a.text) for one in asked for a in one.answers))
    prompts, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]
    by_model = {}
    for name in (*EXPERTS, "pivot"):
        model = Model(folder / name)
        rows = [{"prompt": prompt, "response": text} for prompt, text in pairs]
        lengths = [len(sample.response) for sample in tiny_models.encode(model.tokenizer, rows)]
        means = model.certainties(prompts, texts)
        by_model[name] = {pair: mean * n for pair, mean, n in zip(pairs, means, lengths, strict=True)}
    scores = [
        {(name, a.text): of[one.prompt.sample.plain_text, a.text] for name, of in by_model.items() for a in one.answers}
        for one in asked
    ]
    clusters = k_means([one.prompt.sample.plain_text for one in asked], 12)
    made = []
    for merged in (True, False):
        groupings = [exact(one) if merged else Grouping(tuple(range(len(one.answers)))) for one in asked]
        for temper in (1.0, None):
            found = fit_scores(asked, groupings, scores, clusters, temper=temper)
            firsts = np.cumsum([0, *(grouping.count for grouping in groupings)])
            right = 0
            for index, (one, grouping) in enumerate(zip(asked, groupings, strict=True)):
                best = int(found.posterior[firsts[index] : firsts[index + 1]].argmax())
                right += one.answers[grouping.groups.index(best)].text == truth[one.prompt.sample.plain_text]
            how = f"{'equal texts merged' if merged else 'no two equal'}, temper {'learnt' if temper is None else 1}"
            made.append((how, 100 * right / len(asked), f"rho {found.label:.2f}, tempers {found.temper.tolist()}"))
    return made


def choose_all(asked: list[Candidates], truth: list[str]) -> list[tuple[str, float]]:
    """(how, percent of prompts whose chosen text is right) of every way to choose, worst first."""
    chosen: Texts = [answer and answer.text for answer in (one.chosen(0.0) for one in decide(asked).decisions)]
    found = {how: share_right(choose(asked), truth) for how, choose in PEERS.items()}
    found |= {
        "consensus": share_right(chosen, truth),
        "the label": share_right([one.labels[0].text if one.labels else None for one in asked], truth),
        "oracle among the teachers": share_right(oracle(asked, truth), truth),
    }
    return sorted(found.items(), key=lambda item: item[1])


def score(model: Model, held_out: list[dict[str, Any]]) -> float:
    """Percent of held-out questions answered."""
    given = model.answers([row["prompt"] for row in held_out])
    return 100 * sum(text == row["response"] for text, row in zip(given, held_out, strict=True)) / len(held_out)


SETTINGS = {
    "30% wrong": {"wrong": 0.3},
    "clean": {},
    "few": {"per_field": 80},
    "few, 30% wrong": {"per_field": 80, "wrong": 0.3},
    "no labels": {"per_field": 0},
}


def main() -> None:
    """Make worlds, train students, print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the models")
    parser.add_argument("--worlds", nargs="+", default=["f0"], choices=WORLDS)
    parser.add_argument("--settings", nargs="+", default=["30% wrong", "few", "no labels"], choices=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of world, labels and student")
    parser.add_argument("--steps", type=int, default=400, help="of 32 samples")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of the student")
    parser.add_argument("--free", action="store_true", help="only choose, as if no two answers could be compared")
    parser.add_argument("--choose", action="store_true", help="only choose, by every way there is")
    parser.add_argument("--models", action="store_true", help="only make the models and say how good they are")
    parser.add_argument("--quick", action="store_true", help="hardly any training: only to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.settings, arguments.steps = [0], ["30% wrong"], 10
    torch.set_num_threads(1)
    for name in arguments.worlds:
        lines: dict[str, list[tuple[float, str]]] = {}
        for seed in arguments.seeds:
            folder = arguments.cache / f"{name}-{seed}"
            make_models(WORLDS[name], folder, seed, 30 if arguments.quick else 1000)
            run_seed(folder, seed, arguments, lines)
        for method, of_seeds in lines.items():
            points = [points for points, _ in of_seeds]
            print(
                f"{name}  {method:42} {sum(points) / len(points):5.1f}  ({', '.join(f'{p:.1f}' for p in points)})  "
                f"{'; '.join(note for _, note in of_seeds if note)}"
            )


def run_seed(folder: Path, seed: int, arguments: argparse.Namespace, lines: dict[str, list[tuple[float, str]]]) -> None:
    """All methods of one world and seed, into `lines`."""
    world = facts.facts(seed)
    held_out, train = facts.rows(world, "heldout"), facts.rows(world, "train")

    def add(method: str, points: float, note: str = "") -> None:
        lines.setdefault(method, []).append((points, note))
        print(
            json.dumps({"world": folder.name, "method": method, "points": round(points, 2), "note": note}), flush=True
        )

    for name in () if arguments.free or arguments.choose else (*EXPERTS, "pivot"):
        model = Model(folder / name)
        for field in facts.FIELDS:
            add(f"{name} on {field}", score(model, [row for row in held_out if row["skill"] == field]))
    if arguments.models:
        return
    answers = asked(folder, [row["prompt"] for row in train])
    truth = {row["prompt"]: row["response"] for row in train}

    def student(method: str, rows: list[dict[str, Any]], note: str = "") -> None:
        right = sum(truth[row["prompt"]] == row["response"].strip() for row in rows)
        said = f"{len(rows)} texts, {100 * right / max(1, len(rows)):.1f}% right{note}"
        add(method, score(Model(folder / "pivot").learn(rows, arguments.steps, arguments.rate, seed), held_out), said)

    if arguments.free:
        for setting in arguments.settings:
            asked_of = candidates(facts.labelled(world, seed, **SETTINGS[setting]), answers)  # type: ignore[arg-type]
            for how, points, note in choose_free(folder, asked_of, truth):
                add(f"{setting}: {how}", points, note)
        return
    if arguments.choose:
        for setting in arguments.settings:
            asked_of = candidates(facts.labelled(world, seed, **SETTINGS[setting]), answers)  # type: ignore[arg-type]
            for how, points in choose_all(asked_of, [row["response"] for row in train]):
                add(f"{setting}: {how}", points)
        return
    student("SFT on clean labels, all prompts", train)
    student("SFT on the surest teacher's answers", surest(train, answers))
    for setting in arguments.settings:
        rows = facts.labelled(world, seed, **SETTINGS[setting])  # type: ignore[arg-type]
        labels = [row for row in rows if "response" in row]
        if labels and setting != "clean":
            student(f"SFT on labels, {setting}", labels)
        outcome = decide(candidates(rows, answers))
        rho = "" if outcome.wrong_labels is None else f", {100 * outcome.wrong_labels.right:.1f}% of labels wrong"
        student(f"SFT on chosen answers, {setting}", responses(outcome), rho)


if __name__ == "__main__":
    main()
