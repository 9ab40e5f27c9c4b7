"""The weights of rows as they are: what the consensus says of a label, and of each teacher on its prompt.

Chosen answers carry their weights (outputs.responses). Rows that a stage learns as they stand (`responses: data`) get
theirs here, by their prompt and text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rayfuse.data.sample import Sample, Weights
from rayfuse.errors import DataError


@dataclass(frozen=True)
class _Prompt:
    """What is kept of a prompt: a few numbers, not its texts.

    Attributes:
        teachers: as in Weights.
        labels: (hash of the text, p(right)) of each label.
    """

    teachers: tuple[tuple[str, float], ...]
    labels: tuple[tuple[int, float], ...]


class PromptWeights:
    """Weights by prompt, from a run's consensus/candidates.jsonl."""

    def __init__(self, prompts: dict[bytes, _Prompt], path: Path) -> None:
        self._prompts = prompts
        self._path = path

    @classmethod
    def read(cls, folder: Path) -> PromptWeights:
        """Read what `consensus.make.write` wrote into a run's consensus folder."""
        prompts = {}
        path = folder / "candidates.jsonl"
        with path.open("rb") as lines:
            for line in lines:
                row = json.loads(line.decode("utf-8", "surrogatepass"))
                labels = tuple(
                    (hash(answer["text"]), answer["weight"]) for answer in row["answers"] if answer["source"] == "label"
                )
                prompts[bytes.fromhex(row["key"])] = _Prompt(tuple(sorted(row["weights"].items())), labels)
        return cls(prompts, path)

    def weighted(self, samples: Iterable[Sample]) -> list[Sample]:
        """The samples with their weights.

        Raises:
            DataError: a sample's prompt or label is not among what was asked.
        """
        return [sample.weighted(self._of(sample)) for sample in samples]

    def _of(self, sample: Sample) -> Weights:
        prompt = self._prompts.get(bytes.fromhex(sample.prompt_key))
        if prompt is None:
            raise DataError(
                f"the prompt of sample {sample.key[:12]} ({sample.plain_text!r:.60}) is not in {self._path}: the "
                "consensus did not ask it; are the data still those of the run?"
            )
        right = dict(prompt.labels).get(hash(sample.response))
        if right is None and len(prompt.labels) == 1:  # a thought was taken off (data.thoughts)
            right = prompt.labels[0][1]
        return Weights(right, prompt.teachers)
