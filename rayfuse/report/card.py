"""The model card: README.md of the fused model in Hugging Face format, with the exact configuration inside.

A card is made to be published: of local paths it shows the last component only, and it carries nothing of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rayfuse.config import Config, Stage
from rayfuse.config.public import public_config, public_name
from rayfuse.report.results import ALL, BITS, best, caveat, columns, headline, label, score


def write_card(path: Path, config: Config, results: dict[str, Any]) -> None:
    """Write the card of a finished run's model to `path`.

    Args:
        path: the README.md to write.
        config: the run.
        results: what results.json holds: "data", "models", "times" and "saved".

    Raises:
        OSError: the file cannot be written.
    """
    teachers = any(stage.uses_teachers for stage in config.stages)
    parts = [
        _front_matter(config, teachers),
        f"# {_text(Path(config.output).name)}",
        _what(config, teachers),
        _result(config, results.get("models", [])),
        _how_to_load(config),
        _weights(results.get("saved")),
        *_training_data(config, results),
        _configuration(config),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _front_matter(config: Config, teachers: bool) -> str:
    # What an endpoint serves is a name on that server, not a model that anyone could look up.
    models = [config.student.model, *(t.model for t in config.teachers if teachers and t.endpoint is None)]
    tree = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": list(dict.fromkeys(public_name(model) for model in models)),
        "tags": ["rayfuse", *(["model-fusion", "distillation"] if teachers else [])],
    }
    return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000)}---"


def _what(config: Config, teachers: bool) -> str:
    student = _code(public_name(config.student.model))
    if teachers:
        names = "\n".join(
            f"- {_code(teacher.name)}: {_code(public_name(teacher.model))}, weight {teacher.weight:g}"
            for teacher in config.teachers
        )
        opening = f"{student} (the pivot), into which these teachers were fused with rayfuse:\n\n{names}"
    else:
        opening = f"{student}, trained with rayfuse."
    steps = "\n".join(f"{i}. {_stage(stage, config)}" for i, stage in enumerate(config.stages, start=1))
    return f"{opening}\n\nTrained in {len(config.stages)} stage{'s' * (len(config.stages) > 1)}:\n\n{steps}"


def _stage(stage: Stage, config: Config) -> str:
    amount = f"{stage.steps:,} steps" if stage.steps else _epochs(stage.epochs or 1)
    start = ", from the untouched pivot" if stage.start_from == "pivot" else ""
    method = stage.text(config.signals.k)
    if stage.pairwise is not None:
        method += f" Pairwise: a student per teacher, merged by {stage.pairwise.method}."
    return f"{method} {amount} of {stage.batch_size} samples, learning rate {stage.learning_rate:g}{start}."


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'s' * (number != 1)}"


def _result(config: Config, models: list[dict[str, Any]]) -> str:
    if not models:
        return ""
    names = columns(models)
    winners = {column: best(models, column) for column in names}
    lines = [
        "| model | " + " | ".join(_text(c) + (" ↓" if c == BITS else "") for c in names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for model in models:
        cells = []
        for column in names:
            found = score(model, column)
            bold = "**" if model["name"] in winners[column] else ""
            cells.append(f"{bold}{found.text}{bold} ({found.interval})" if found else "–")
        lines.append(f"| {_text(label(model))} | " + " | ".join(cells) + " |")
    total = next((m["accuracy"][ALL]["total"] for m in models if ALL in m["accuracy"]), None)
    items = f"{total:,} held-out items. " if total else ""
    note = (
        f"{items}In brackets: the 95% interval. Bold: best of pivot and stages, by the value alone. ↓ less is better."
    )
    said = (*headline(models), caveat(models, config.model_dump()["stages"]))
    sentences = " ".join(_text(sentence) for sentence in said if sentence)
    return "\n\n".join(part for part in ("## Result", sentences, "\n".join(lines), note) if part)


def _how_to_load(config: Config) -> str:
    remote = ", trust_remote_code=True" if config.student.trust_remote_code else ""
    return f"""## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or the hub id it was uploaded under
tokenizer = AutoTokenizer.from_pretrained(folder{remote})
model = AutoModelForCausalLM.from_pretrained(folder{remote})

messages = [{{"role": "user", "content": "Which number is larger, 17 or 71?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def _weights(saved: dict[str, Any] | None) -> str:
    if saved is None:
        return ""
    kept = saved["update_kept"]
    rounded = "" if kept is None else f" {kept:.1%} of the training's update survives the rounding to it."
    return f"The weights are in {saved['dtype']}.{rounded}"


def _training_data(config: Config, results: dict[str, Any]) -> Iterator[str]:
    """What the stages read that led to this model: rows as they are, or what the consensus chose of them."""
    led = list(config.stages)
    start = max((index for index, stage in enumerate(led) if stage.start_from == "pivot"), default=0)
    learns = {config.learns_chosen(stage) for stage in led[start:] if not stage.uses_preferences}
    if False in learns and results.get("data"):
        yield _data(config, results["data"])
    if True in learns and results.get("chosen"):
        counts = results["chosen"]
        names = ", ".join(_code(public_name(path)) for part in config.data.parts for path in part.paths)
        yield (
            f"## Training data\n\nTeachers and the pivot answered the prompts of {names}. Trained on the "
            f"{counts['samples']:,} answers and labels that are probably right; {counts['too_long']:,} more were too "
            f"long and {counts.get('unreadable', 0):,} unreadable for a model, and were left out."
        )


def _data(config: Config, counts: dict[str, Any]) -> str:
    names = ", ".join(_code(public_name(path)) for part in config.data.parts for path in part.paths)
    text = (
        f"{counts['rows']:,} rows of {names}; {counts['bad_rows']:,} malformed rows "
        f"were skipped, {counts['too_long']:,} samples longer than {config.data.max_length:,} tokens (or a teacher's "
        f"context) and {counts.get('unreadable', 0):,} that a model cannot read exactly were dropped. "
        f"Trained on {counts['samples']:,} samples (one for each assistant turn), with the prompt cut in "
        f"{counts['cut']:,} of them."
    )
    calling, context = counts.get("calling_turns", 0), counts.get("context_turns", 0)
    if calling or context:
        text += (
            f" Read as context and not learned: {calling:,} turns that call tools, {context:,} that the data mark so."
        )
    return f"## Training data\n\n{text}"


def _configuration(config: Config) -> str:
    text = yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True, width=1000)
    return (
        "## Configuration\n\nEvery setting of the run, defaults filled in; of local paths the last component.\n\n"
        f"```yaml\n{text}```"
    )


def _text(text: str) -> str:
    """Outside text in Markdown: no HTML, no table cell ended early, no formatting begun."""
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("\n", " ")):
        text = text.replace(mark, entity)
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text)


def _code(text: str) -> str:
    return "`" + re.sub(r"[`\n]", " ", text) + "`"
