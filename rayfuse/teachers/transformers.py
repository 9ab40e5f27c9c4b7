"""A teacher in plain transformers, on CPU or GPU.

The logits are computed for the response's positions only and a chunk at a time, so a [B, T, V] tensor never exists.
Vocabulary rows that pad the weight matrix beyond the tokenizer are left out of the softmax and the top-K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import GenerationConfig

from rayfuse.config import Teacher
from rayfuse.data.render import Rendered, Renderer
from rayfuse.data.sample import Sample
from rayfuse.errors import TeacherError
from rayfuse.losses import teacher_topk
from rayfuse.models.loading import context_length, load_causal_lm, valid_vocabulary
from rayfuse.models.output_layer import check_output_layer, output_layer, output_rows, text_decoder
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.backend import Backend
from rayfuse.teachers.generation import generate_ids
from rayfuse.teachers.sampling import SeededSampling


class TransformersTeacher(Backend):
    """Scores samples with a transformers causal language model.

    Attributes:
        vocab_size: ids in the signals are below this.
        k: kept logits per position.
    """

    def __init__(self, teacher: Teacher, k: int) -> None:
        self.teacher = teacher
        self.k = k
        self.renderer = Renderer.of(teacher)
        self.device = torch.device("cuda" if teacher.gpus else "cpu")
        if self.device.type == "cpu":
            # The bits of a matrix product depend on the number of threads: it is part of the configuration.
            torch.set_num_threads(max(1, int(teacher.cpus)))
        self.model = load_causal_lm(teacher, device=self.device)
        # The model's own generation_config must not change what is compared, and is no part of the fingerprint.
        self.model.generation_config = GenerationConfig()
        self.decoder = text_decoder(self.model)
        rows = output_rows(self.model)
        self.layer = output_layer(self.model, valid_vocabulary(self.renderer.tokenizer, rows))
        check_output_layer(self.model, self.layer)
        self.dtype = getattr(torch, teacher.autocast or teacher.dtype)
        if teacher.autocast is not None:  # as the student's fused head does
            bias = None if self.layer.bias is None else self.layer.bias.to(self.dtype)
            self.layer = replace(self.layer, weight=self.layer.weight.to(self.dtype), bias=bias)
        self.context = context_length(self.model.config)
        self.vocab_size = self.layer.valid_vocab
        if k > self.vocab_size:
            raise TeacherError(f"signals.k is {k}, but {teacher.name} has only {self.vocab_size} tokens")

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[TopKSignals]:
        """Signals of each sample, in order.

        The samples are forwarded in batches of at most `batch_tokens` tokens with padding, longest first; the batches
        depend on the samples alone, so the same unit gives the same bits.

        Raises:
            DataError: a sample's response does not fit the model's context.
            AlignmentError: the tokenizer does not keep a response's bytes.
        """
        rendered = [self.renderer.render(sample, self.context) for sample in samples]
        signals: list[TopKSignals | None] = [None] * len(rendered)
        for batch in length_batches([item.length for item in rendered], self.teacher.batch_tokens):
            for index, answer in zip(batch, self._forward([rendered[i] for i in batch]), strict=True):
                signals[index] = answer
        return [answer for answer in signals if answer is not None]

    @torch.inference_mode()
    def generate(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int,
        batch_size: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer to each sample's prompt, in order; see Backend.generate. Prompts of similar length go together.

        An answer's random numbers depend on its own prompt and the seed alone; see sampling.
        """
        room = None if self.context is None else max(1, self.context - max_new_tokens)
        prompts = [self.renderer.prompt_ids(sample)[-room if room else 0 :] for sample in samples]
        end = self.renderer.end_of_turn
        answers = [""] * len(samples)
        order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            sampling = []
            if temperature:
                sampling = [
                    SeededSampling(
                        [samples[i] for i in batch],
                        seed=seed,
                        temperature=temperature,
                        max_new_tokens=max_new_tokens,
                        vocab_size=self.vocab_size,
                    )
                ]
            with self._autocast():
                written = generate_ids(
                    self.model,
                    [prompts[i] for i in batch],
                    max_new_tokens=max_new_tokens,
                    end=end,
                    processors=sampling,
                )
            for i, ids in zip(batch, written, strict=True):
                ids = ids[:-1] if ids[-1:] == [end] else ids
                answers[i] = self.renderer.tokenizer.decode(ids, skip_special_tokens=True)
        return answers

    def _autocast(self) -> torch.autocast:
        # A forward uses each weight once: copies of all of them, which the cache would keep, are half the model again.
        on = self.teacher.autocast is not None
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=on, cache_enabled=False)

    def _forward(self, batch: list[Rendered]) -> list[TopKSignals]:
        T = max(item.length for item in batch) - 1  # the end-of-turn token itself is predicted, never read
        input_ids_BT = torch.zeros(len(batch), T, dtype=torch.long)
        mask_BT = torch.zeros(len(batch), T, dtype=torch.long)
        rows: list[np.ndarray] = []
        for b, item in enumerate(batch):
            ids = np.concatenate([item.prompt_ids, item.response_ids[:-1]])
            input_ids_BT[b, : len(ids)] = torch.from_numpy(ids)
            mask_BT[b, : len(ids)] = 1
            rows.append(b * T + len(item.prompt_ids) - 1 + np.arange(len(item.response_ids)))
        with self._autocast():
            hidden_BTH = self.decoder(
                input_ids=input_ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), use_cache=False
            ).last_hidden_state
        rows_N = torch.from_numpy(np.concatenate(rows)).to(self.device)
        next_ids_N = torch.from_numpy(np.concatenate([item.response_ids for item in batch])).to(self.device)
        top = teacher_topk(
            hidden_BTH.flatten(0, 1)[rows_N].to(self.layer.weight.dtype),
            self.layer.weight,
            next_ids_N,
            self.k,
            **self.layer.options(),
        )
        logps = top.logps.cpu().numpy().astype(np.float16)
        ids_NK = top.ids.cpu().numpy().astype(np.int32)
        lse = top.lse.float().cpu().numpy()
        next_logps = top.next_logps.float().cpu().numpy()
        signals = []
        start = 0
        for item in batch:
            part = slice(start, start + len(item.response_ids))
            start = part.stop
            signals.append(
                TopKSignals(
                    logps=logps[part],
                    ids=ids_NK[part],
                    lse=lse[part],
                    token_logps=next_logps[part],
                    byte_ends=item.ends,
                ).validate(self.vocab_size)
            )
        return signals


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of `lengths`, longest first, cut so that each batch padded to its longest has at most `batch_tokens`.

    A sequence longer than `batch_tokens` is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
