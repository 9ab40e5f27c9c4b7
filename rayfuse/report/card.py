"""The model card: README.md of the fused model in Hugging Face format, with the exact configuration inside.

A card is made to be published: of local paths it shows the last component only, and it carries nothing of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rayfuse.config import (
    DPO,
    KL,
    SFT,
    ULD,
    WRPO,
    ByteKD,
    Config,
    Distillation,
    FuseChat,
    FusedPreference,
    FuseLLM,
    InfiFPO,
    InfiFusion,
    InfiGFusion,
    MiniLogit,
    MultiLevelOT,
    Preference,
    RankDistillation,
    Sinkhorn,
    Stage,
    TeacherStage,
    Trust,
    ULDHybrid,
    WassersteinKL,
)
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
    teachers = any(not isinstance(stage, SFT) for stage in config.stages)
    parts = [
        _front_matter(config, teachers),
        f"# {_text(Path(config.output).name)}",
        _what(config, teachers),
        _result(config, results.get("models", [])),
        _how_to_load(config),
        _weights(results.get("saved")),
        _data(config, results.get("data", {})),
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
    method = STAGE_TEXTS[type(stage)](stage, config)
    if isinstance(stage, TeacherStage) and stage.merge is not None:
        method += f" Pairwise: a student per teacher, merged by {stage.merge.method}."
    return f"{method} {amount} of {stage.batch_size} samples, learning rate {stage.learning_rate:g}{start}."


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'s' * (number != 1)}"


def _infifusion_text(stage: InfiFusion, config: Config) -> str:
    form = "pairwise" if stage.merge else "unified"
    return (
        f"`infifusion` ({form} InfiFusion, [arXiv 2501.02795](https://arxiv.org/abs/2501.02795)): "
        f"{_distillation_text(stage, config)}."
    )


def _infigfusion_text(stage: InfiGFusion, config: Config) -> str:
    distance = "closed-form" if stage.mode == "closed" else "exact Gromov-Wasserstein"
    return (
        f"`infigfusion` (InfiGFusion, [arXiv 2505.13893](https://arxiv.org/abs/2505.13893)): "
        f"{_distillation_text(stage, config)}, plus {stage.alpha:g} x the {distance} distance between the graphs on "
        "their logits."
    )


def _distillation_text(stage: RankDistillation, config: Config) -> str:
    kind = "z-scored " if stage.standardized else ""
    distance = (
        f"distance between the {kind}top-{_kept(stage, config)} {stage.space} of teacher and student, rank by rank"
    )
    return _weighted_text(stage, distance)


def _weighted_text(stage: Distillation, distance: str) -> str:
    meet = "both tokenizers have read equally many bytes" if stage.alignment == "bytes" else "the position is the same"
    return (
        f"{1 - stage.lam:g} x cross-entropy + {stage.lam:g} x the {stage.over_teachers} over the teachers of the "
        f"{distance}, wherever {meet}"
    )


def _kept(stage: Distillation, config: Config) -> int:
    return stage.k or config.signals.k


def _kl_text(stage: KL, config: Config) -> str:
    kind = {"forward": "forward KL", "reverse": "reverse KL", "jsd": "Jensen-Shannon"}[stage.divergence]
    distance = f"{kind} divergence over the teachers' top-{_kept(stage, config)} tokens that the student has too"
    return f"`kl`: {_weighted_text(stage, f'{distance} (temperature {stage.temperature:g})')}."


def _minilogit_text(stage: MiniLogit, config: Config) -> str:
    distance = f"squared distance of the centred logits of the teachers' top-{_kept(stage, config)} tokens"
    return f"`minilogit`: {_weighted_text(stage, f'{distance} that the student has too')}."


def _uld_text(stage: ULD, config: Config) -> str:
    distance = f"L1 distance between the sorted top-{_kept(stage, config)} probabilities of teacher and student"
    return f"`uld` (ULD, [arXiv 2402.12030](https://arxiv.org/abs/2402.12030)): {_weighted_text(stage, distance)}."


def _uld_hybrid_text(stage: ULDHybrid, config: Config) -> str:
    distance = (
        f"Jensen-Shannon divergence over shared tokens and the sorted L1 distance of the others, both within the top-"
        f"{_kept(stage, config)}"
    )
    return f"`uld_hybrid` (ULD with matched tokens, as in TRL's GOLD): {_weighted_text(stage, distance)}."


def _multilevelot_text(stage: MultiLevelOT, config: Config) -> str:
    distance = (
        f"L1 distance between the scaled top-{_kept(stage, config)} distributions over the {stage.channels} tokens of "
        f"most mass, with {stage.ce_weight:g} x a cross-entropy and {stage.sequence_weight:g} x a Sinkhorn distance "
        "between positions"
    )
    paper = "[arXiv 2412.14528](https://arxiv.org/abs/2412.14528)"
    return f"`multilevelot` (MultiLevelOT, {paper}): {_weighted_text(stage, distance)}."


def _sinkhorn_text(stage: Sinkhorn, config: Config) -> str:
    distance = (
        f"Sinkhorn distance (entropy {stage.regularisation:g}, {stage.iterations} iterations) between the ranks of the "
        f"top-{_kept(stage, config)} probabilities of teacher and student (temperature {stage.temperature:g})"
    )
    return f"`sinkhorn`: {_weighted_text(stage, distance)}."


def _wasserstein_kl_text(stage: WassersteinKL, config: Config) -> str:
    distance = (
        f"mixture of {stage.mix:g} x Wasserstein and {1 - stage.mix:g} x KL between the ranks of the "
        f"top-{_kept(stage, config)} probabilities of teacher and student (temperature {stage.temperature:g})"
    )
    return f"`wasserstein_kl`: {_weighted_text(stage, distance)}."


def _fusellm_text(stage: FuseLLM | FuseChat, config: Config) -> str:
    name, paper = ("FuseLLM", "2401.10491") if isinstance(stage, FuseLLM) else ("FuseChat", "2408.07990")
    return (
        f"`{stage.method}` ({name}, [arXiv {paper}](https://arxiv.org/abs/{paper})): {1 - stage.lam:g} x cross-entropy "
        f"+ {stage.lam:g} x cross-entropy against the top-{config.signals.k} probabilities of each sample's best "
        "teacher, mapped by minimum edit distance."
    )


def _bytekd_text(stage: ByteKD, config: Config) -> str:
    return (
        f"`bytekd` (byte-prefix distillation): cross-entropy against {1 - stage.lam:g} x the written text + "
        f"{stage.lam:g} x the teachers' top-{config.signals.k} probabilities, carried byte by byte onto the student's "
        "tokens."
    )


def _trust_text(stage: Trust, config: Config) -> str:
    return (
        "`trust` (trust-weighted fine-tuning): cross-entropy in which a sample counts by the probability per token "
        f"that its surest teacher gives to the response, to the power {stage.trust:g}."
    )


def _preference_text(stage: Preference, loss: str) -> str:
    norm = "length-normalised" if stage.length_norm else "summed"
    return f"{loss} loss with beta {stage.beta:g} on {norm} log-probabilities of preference pairs"


def _fused_text(stage: FusedPreference) -> str:
    clip = ", clipped by the model that the stage starts from" if stage.clip else ""
    return f"the teachers fused by {stage.rule} per {stage.fuse_per}{clip}"


def _infifpo_text(stage: InfiFPO, config: Config) -> str:
    return (
        f"`infifpo` (InfiFPO, [arXiv 2505.13878](https://arxiv.org/abs/2505.13878)): "
        f"{_preference_text(stage, stage.variant)}, against {_fused_text(stage)}."
    )


def _wrpo_text(stage: WRPO, config: Config) -> str:
    reference = _fused_text(stage) if stage.reference == "fused" else "the model that the stage starts from"
    return (
        f"`wrpo` (WRPO, [arXiv 2412.03187](https://arxiv.org/abs/2412.03187)): {_preference_text(stage, 'log-sigmoid')}"
        f", {stage.alpha:g} x a teacher's response + {1 - stage.alpha:g} x the pivot's own, against {reference}."
    )


def _dpo_text(stage: DPO, config: Config) -> str:
    return (
        f"`dpo` (DPO, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)): {_preference_text(stage, stage.variant)}, "
        "against the model that the stage starts from."
    )


STAGE_TEXTS: dict[type[Stage], Callable[[Any, Config], str]] = {
    SFT: lambda stage, config: "`sft`: cross-entropy on the assistant's turns.",
    InfiFusion: _infifusion_text,
    InfiGFusion: _infigfusion_text,
    ByteKD: _bytekd_text,
    Trust: _trust_text,
    KL: _kl_text,
    MiniLogit: _minilogit_text,
    ULD: _uld_text,
    ULDHybrid: _uld_hybrid_text,
    FuseLLM: _fusellm_text,
    FuseChat: _fusellm_text,
    MultiLevelOT: _multilevelot_text,
    Sinkhorn: _sinkhorn_text,
    WassersteinKL: _wasserstein_kl_text,
    InfiFPO: _infifpo_text,
    DPO: _dpo_text,
    WRPO: _wrpo_text,
}


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


def _data(config: Config, counts: dict[str, Any]) -> str:
    if not counts:
        return ""
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
