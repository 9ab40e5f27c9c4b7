"""Small language models made on the spot: a tokenizer, a Llama with random weights, a plain training loop.

Each of the four models has its own byte-level BPE vocabulary, its own way of cutting numbers and its own chat template,
so that nothing but the bytes of a response is shared between them, as between real models of different makers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from rayfuse.data.template import ChatTemplate
from rayfuse.errors import ModelError

IGNORED = -100


@dataclass(frozen=True)
class Style:
    """What makes a model's text its own: size of the vocabulary, how numbers are cut, the chat template.

    `numbers` is a regular expression of one piece of a number. `before` and `after` stand round the text of each role;
    the first token of `after["assistant"]` is the end of a turn.
    """

    vocabulary: int
    numbers: str
    start: str
    before: dict[str, str]
    after: dict[str, str]
    special: tuple[str, ...]
    end_of_turn: str

    @property
    def chat_template(self) -> str:
        """The Jinja template that writes a conversation in this style: who is not the assistant speaks as the user."""
        parts = [_quoted(self.start), "{%- for message in messages -%}"]
        for branch, role in (("if message['role'] != 'assistant'", "user"), ("else", "assistant")):
            parts += [f"{{%- {branch} -%}}", _quoted(self.before[role])]
            parts += ["{{- message['content'] -}}", _quoted(self.after[role])]
        parts += ["{%- endif -%}", "{%- endfor -%}"]
        parts += ["{%- if add_generation_prompt -%}", _quoted(self.before["assistant"]), "{%- endif -%}"]
        return "".join(parts)


def _quoted(text: str) -> str:
    escaped = text.replace("\n", "\\n")
    return f"{{{{- '{escaped}' -}}}}" if text else ""


STYLES = {
    "math": Style(
        vocabulary=608,
        numbers=r"\p{N}{1,3}",
        start="",
        before={"user": "<|user|>", "assistant": "<|assistant|>"},
        after={"user": "<|end|>", "assistant": "<|end|>"},
        special=("<|user|>", "<|assistant|>", "<|end|>"),
        end_of_turn="<|end|>",
    ),
    "code": Style(
        vocabulary=640,
        numbers=r"\p{N}",
        start="",
        before={"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n"},
        after={"user": "<|im_end|>\n", "assistant": "<|im_end|>\n"},
        special=("<|im_start|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
    ),
    "instruct": Style(
        vocabulary=576,
        numbers=r"\p{N}{1,2}",
        start="<s>",
        before={"user": "[INST]", "assistant": ""},
        after={"user": "[/INST]", "assistant": "</s>"},
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        end_of_turn="</s>",
    ),
    "pivot": Style(
        vocabulary=512,
        numbers=r"\p{N}+",
        start="",
        before={"user": "<|role|>user<|text|>", "assistant": "<|role|>assistant<|text|>"},
        after={"user": "<|over|>", "assistant": "<|over|>"},
        special=("<|role|>", "<|text|>", "<|over|>"),
        end_of_turn="<|over|>",
    ),
}
PAD = "<|pad|>"


def make_tokenizer(style: Style, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`: its alphabet holds all 256 bytes, so it covers every text."""
    pieces = rf" ?\p{{L}}+| ?{style.numbers}| ?[^\s\p{{L}}\p{{N}}]+|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, *style.special)]
    trainer = trainers.BpeTrainer(
        vocab_size=style.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\nassistant\n" * 100], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=style.end_of_turn,
        pad_token=PAD,
        chat_template=style.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int = 128, layers: int = 3) -> LlamaForCausalLM:
    """A Llama with random weights for this tokenizer; 0.6 million parameters besides the embedding at the defaults."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=48,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


class Sample(NamedTuple):
    """One conversation in a model's own tokens; `response` ends with the end-of-turn token."""

    prompt: list[int]
    response: list[int]


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, Any]]) -> list[Sample]:
    """The rows as this model reads them: rendered prompt, then the response encoded alone, then end-of-turn."""
    prompts = _ids(tokenizer, [render_prompt(tokenizer, row["prompt"]) for row in rows])
    responses = _ids(tokenizer, [row["response"] for row in rows])
    end = end_of_turn(tokenizer)
    return [Sample(prompt, [*response, end]) for prompt, response in zip(prompts, responses, strict=True)]


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The text that stands before the response, by the tokenizer's chat template."""
    messages = [{"role": "user", "content": prompt}]
    return ChatTemplate(tokenizer).render(messages, open_turn=True)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the first token that the chat template writes after the assistant's words.

    Raises ModelError where it writes nothing there.
    """
    answer = {"role": "assistant", "content": "answer"}
    text = ChatTemplate(tokenizer).render([{"role": "user", "content": "question"}, answer], open_turn=False)
    ids = tokenizer.encode(text.rpartition("answer")[2], add_special_tokens=False)
    if not ids:
        raise ModelError("the chat template writes nothing after the assistant's words, so a turn has no end")
    return int(ids[0])


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def train(
    model: LlamaForCausalLM,
    samples: Sequence[Sample],
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    warmup: int = 50,
    seed: int = 0,
) -> list[float]:
    """Train in place on the responses: AdamW, linear warm-up, cosine to zero. Returns the loss of each step.

    The loss is the mean cross-entropy per token of the responses, end-of-turn included. With one torch thread the
    result depends on the arguments only.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, warmup))
    losses = []
    model.train()
    for chosen in _batches(samples, batch, steps, Random(seed)):
        ids_BT, labels_BT = _padded(chosen)
        hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        predicts_BT = labels_BT != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden_BTH[predicts_BT]), labels_BT[predicts_BT])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _rate(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate at this step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(samples: Sequence[Sample], batch: int, steps: int, draw: Random) -> Iterator[list[Sample]]:
    """`steps` batches of samples of similar length, pass after pass over the samples, each pass in a new order."""
    window = 16 * batch
    order: list[int] = []
    batches: list[list[int]] = []
    for _ in range(steps):
        if not batches:
            order = list(range(len(samples)))
            draw.shuffle(order)
            for start in range(0, len(order), window):
                near = sorted(order[start : start + window], key=lambda i: len(samples[i].prompt + samples[i].response))
                batches += [near[i : i + batch] for i in range(0, len(near), batch)]
            draw.shuffle(batches)
        yield [samples[i] for i in batches.pop()]


def _padded(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, [B,T]: the label at a position is the token to predict there, IGNORED outside the responses.

    Padding stands on the right and attention is causal, so that no position that counts ever sees it.
    """
    length = max(len(sample.prompt) + len(sample.response) for sample in samples) - 1
    ids_BT = torch.zeros(len(samples), length, dtype=torch.long)
    labels_BT = torch.full((len(samples), length), IGNORED)
    for row, (prompt, response) in enumerate(samples):
        text = torch.tensor(prompt + response)
        ids_BT[row, : len(text) - 1] = text[:-1]
        labels_BT[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
    return ids_BT, labels_BT


@torch.inference_mode()
def answers(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """The model's greedy response to each prompt, without special tokens."""
    model.eval()
    ids = _ids(tokenizer, [render_prompt(tokenizer, prompt) for prompt in prompts])
    length = max(map(len, ids))
    ids_BT = torch.tensor([[model.config.pad_token_id] * (length - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    output_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT)
    return list(tokenizer.batch_decode(output_BT[:, length:], skip_special_tokens=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format: safetensors, generation config, chat template."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
