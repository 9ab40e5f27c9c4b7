"""What a teacher's own weights say, by a plain transformers forward, and why a serving path says something else.

Nothing here is shared with the backends: one sample at a time without padding, the full [L, V] logits, log_softmax, the
prompt as the tokenizer encodes the rendered text. A difference is diagnosed by trying: each `Variation` is
one known way to be wrong, done to the reference on purpose; the one that makes the difference go away is the cause.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from rayfuse.config import Model
from rayfuse.data.render import Renderer
from rayfuse.data.sample import Sample
from rayfuse.models.loading import context_length, inspect_model, load_causal_lm, load_model_config, text_config
from rayfuse.signals.topk import TopKSignals

ROOM = 1.3
"""A model is loaded where its weights times this fit: activations and logits of the probes need little."""
ABSENT = 100.0
"""Difference (nats) where the serving path names a token that the model does not have."""


@dataclass(frozen=True)
class Variation:
    """One way a serving path can be wrong, as a change to the reference.

    Attributes:
        cause: the word for it: template, bos, padding, dtype, quantisation, position.
        text: what the serving path seems to do, and what to look at.
        prompt: another way to make the prompt's ids.
        end: another end-of-turn token.
        dtype: number format of the forward.
        bits: weights rounded to so many bits.
        padded: the vocabulary's padded rows are left in the softmax.
        shift: rows by which the predictions are displaced.
    """

    cause: str
    text: str
    prompt: Callable[[Sample], list[int]] | None = None
    end: int | None = None
    dtype: str | None = None
    bits: int | None = None
    padded: bool = False
    shift: int = 0


PLAIN = Variation("", "")


@dataclass(frozen=True)
class Difference:
    """How far one sample's signals are from the reference, in nats beyond what float16 rounds away.

    Attributes:
        mean: over all rows, and over the kept K and the token that follows.
        worst: the largest of them.
        top1: share of the rows where both have the same most likely token.
    """

    mean: float
    worst: float
    top1: float


class Reference:
    """A model and its tokenizer, loaded without any of the backends' code.

    Attributes:
        device, dtype: where and in which number format it runs: float32 unless that does not fit.
    """

    def __init__(self, model: Model, *, gpu: bool) -> None:
        self.renderer = Renderer.of(model)
        self.tokenizer = self.renderer.tokenizer
        self.context = context_length(load_model_config(model))
        self.device, self.dtype = _place(model, gpu)
        self.model = load_causal_lm(model, dtype=self.dtype, device=self.device)
        self.vocabulary = self.renderer.vocabulary
        self._changed: tuple[Variation, Any] = (PLAIN, self.model)

    def prompt(self, sample: Sample) -> list[int]:
        """The prompt as the tokenizer encodes the rendered text."""
        return self.plain(sample) if self.renderer.plain else self._ids(self.renderer.prompt_text(sample))

    def otherwise(self, sample: Sample, **rendering: Any) -> list[int]:
        """The prompt by the template alone, with other arguments of ChatTemplate.render."""
        arguments = {"open_turn": True, **rendering}
        return self._ids(self.renderer.template.render(sample.turns, sample.offered_tools, **arguments))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def plain(self, sample: Sample) -> list[int]:
        """The prompt without a template, as the tokenizer encodes a text (with its BOS, without an EOS)."""
        ids = list(self.tokenizer(sample.plain_text)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    @torch.inference_mode()
    def logps(self, sample: Sample, variation: Variation = PLAIN) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities [L, V] float32 of every token at every response position, and the L ids that follow."""
        prompt = (variation.prompt or self.prompt)(sample)
        end = self.renderer.end_of_turn if variation.end is None else variation.end
        response = [*self.tokenizer(sample.response, add_special_tokens=False)["input_ids"], end]
        if self.context is not None:
            prompt = prompt[-max(1, self.context - len(response)) :]
        ids = torch.tensor([[*prompt, *response]], device=self.device)
        logits_TV = self._model(variation)(input_ids=ids, use_cache=False).logits[0]
        logits_LV = logits_TV[len(prompt) - 1 : -1].float()
        if not variation.padded:
            logits_LV = logits_LV[:, : self.vocabulary]
        return torch.log_softmax(logits_LV, dim=-1).cpu().numpy(), np.array(response)

    def _model(self, variation: Variation) -> Any:
        if variation.dtype is None and variation.bits is None:
            return self.model
        if self._changed[0] != variation:  # one changed copy at a time
            self._changed = (PLAIN, self.model)
            changed = copy.deepcopy(self.model)
            if variation.bits is not None:
                round_weights(changed, variation.bits)
            if variation.dtype is not None:
                _lower(changed, getattr(torch, variation.dtype))
            self._changed = (variation, changed)
        return self._changed[1]

    def difference(self, sample: Sample, answer: TopKSignals, variation: Variation = PLAIN) -> Difference:
        """How far an answer is from the reference (or from the reference as `variation` changes it)."""
        logps_LV, next_L = self.logps(sample, variation)
        logps_LV, next_L = np.roll(logps_LV, variation.shift, axis=0), np.roll(next_L, variation.shift)
        rows = np.arange(len(answer))[:, None]
        ids_LK = np.minimum(answer.ids, logps_LV.shape[1] - 1)
        served_LK = answer.logps.astype(np.float32)
        rounding_LK = np.spacing(np.abs(answer.logps)).astype(np.float32) / 2
        off_LK = np.maximum(np.abs(served_LK - logps_LV[rows, ids_LK]) - rounding_LK, 0)
        off_LK[answer.ids >= logps_LV.shape[1]] = ABSENT
        off_L = np.abs(answer.token_logps - logps_LV[rows[:, 0], next_L])
        off = np.concatenate([off_LK, off_L[:, None]], axis=1)
        same = logps_LV.argmax(1) == answer.ids[:, 0]
        return Difference(float(off.mean()), float(off.max()), float(same.mean()))

    def effect(self, sample: Sample, answer: TopKSignals, variation: Variation) -> float:
        """How much `variation` changes the reference itself, at the tokens that the answer names (nats, mean)."""
        rows, ids_LK = np.arange(len(answer))[:, None], np.minimum(answer.ids, self.vocabulary - 1)
        plain, changed = (self.logps(sample, which)[0][rows, ids_LK] for which in (PLAIN, variation))
        return float(np.abs(plain - changed).mean())

    def tokens_differ(self, sample: Sample, answer: TopKSignals) -> str:
        """What is different about the response's tokens; empty where they are the same."""
        ids = self.tokenizer(sample.response, add_special_tokens=False)["input_ids"]
        if len(answer) != len(ids) + 1:
            return (
                f"cuts {sample.response!r:.40} into {len(answer) - 1} tokens, the configured tokenizer into {len(ids)}"
            )
        read = 0 if not len(answer.byte_ends) else int(answer.byte_ends[-1])
        if read != len(sample.response.encode()):
            return f"reads {read} of the {len(sample.response.encode())} bytes of {sample.response!r:.40}"
        return ""

    def fits(self, sample: Sample) -> bool:
        """Whether the response leaves room for a prompt in the model's context."""
        tokens = len(self.tokenizer(sample.response, add_special_tokens=False)["input_ids"]) + 1
        return self.context is None or tokens < self.context

    def variations(self, templates: Mapping[str, str]) -> Iterator[Variation]:
        """Every known way to be wrong that means something for this model.

        Args:
            templates: chat templates of other models, by name, which may have been taken by mistake.
        """
        yield from self._prompts(templates)
        eos = self.tokenizer.eos_token_id
        if eos is not None and eos != self.renderer.end_of_turn:
            yield Variation("template", "ends a turn with the eos token instead of the template's own", end=int(eos))
        if self.model.get_output_embeddings().weight.shape[0] > self.vocabulary:
            yield Variation(
                "padding",
                f"leaves the padded rows of the output layer (from id {self.vocabulary} on) in the softmax",
                padded=True,
            )
        for shift in (1, -1):
            yield Variation(
                "position", f"answers {abs(shift)} position too {'late' if shift > 0 else 'early'}", shift=shift
            )
        for bits in (8, 4):
            yield Variation("quantisation", f"serves weights rounded to {bits} bits", bits=bits)

    def formats(self) -> Iterator[Variation]:
        """The number formats below the reference's own."""
        for dtype in ("bfloat16", "float16"):
            if self.dtype == "float32":
                yield Variation(
                    "dtype", f"computes in {dtype}; set the teacher's dtype to it, or serve float32", dtype=dtype
                )

    def _prompts(self, templates: Mapping[str, str]) -> Iterator[Variation]:
        """The ways to make another prompt of the same messages."""
        if self.tokenizer.chat_template:
            yield Variation("template", "reads the prompt as plain text, without the chat template", prompt=self.plain)
            for text, arguments in (
                ("does not open the assistant's turn (add_generation_prompt)", {"open_turn": False}),
                ("writes today's date into the prompt; it must be fixed", {"today": datetime.date.today()}),
                ("puts the generation prompt's open thought before every response", {"open_turn": True}),
            ):
                yield Variation("template", text, prompt=_with(self.otherwise, arguments))
        for name, template in {**templates, "ChatML": CHATML}.items():
            if template and template != self.tokenizer.chat_template:
                text = f"uses the chat template of {name}"
                yield Variation("template", text, prompt=_with(self.otherwise, {"template": template}))
        bos = self.tokenizer.bos_token_id
        bos = getattr(text_config(self.model.config), "bos_token_id", None) if bos is None else bos
        if isinstance(bos, int):
            yield Variation(
                "bos",
                "reads one more BOS token before the prompt: the template and the tokenizer both write one",
                prompt=lambda sample: [bos, *self.prompt(sample)],
            )
            yield Variation(
                "bos",
                "leaves out the BOS token before the prompt",
                prompt=lambda sample: self.prompt(sample)[self.prompt(sample)[0] == bos :],
            )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _with(prompt: Callable[..., list[int]], arguments: Mapping[str, Any]) -> Callable[[Sample], list[int]]:
    return lambda sample: prompt(sample, **arguments)


def _place(model: Model, gpu: bool) -> tuple[torch.device, str]:
    """Device and number format: float32 where it fits, the GPU before the CPU, else the model's own format."""
    parameters = sum(p.numel() for p in inspect_model(model)[0].parameters())
    room = {torch.device("cpu"): psutil.virtual_memory().available}
    if gpu and torch.cuda.is_available():
        room = {torch.device("cuda"): torch.cuda.mem_get_info()[0], **room}
    for device, free in room.items():
        if parameters * 4 * ROOM <= free:
            return device, "float32"
    for device, free in room.items():
        if parameters * 2 * ROOM <= free and model.dtype != "float32":
            return device, model.dtype
    return torch.device("cpu"), model.dtype


def _lower(model: Any, dtype: torch.dtype) -> None:
    """Another number format up to the last hidden states, in place; from the rounded output layer on float32, as the
    engines that keep log-probabilities accurate do."""
    model.to(dtype)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.float(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.float(), requires_grad=False)
    head.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))


def round_weights(model: torch.nn.Module, bits: int, group: int = 128) -> None:
    """Round every linear layer's weight to `bits` bits, in place: symmetric, one scale per output row (8 bits) or per
    `group` inputs of a row (4 bits), the forms that the common formats share."""
    levels = 2 ** (bits - 1) - 1
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
            weight = layer.weight.data
            parts = weight.split(group if bits < 8 else weight.shape[1], dim=1)
            rounded = []
            for part in parts:
                scale = part.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / levels
                rounded.append((part / scale).round().clamp(-levels - 1, levels) * scale)
            layer.weight.data = torch.cat(rounded, dim=1)
