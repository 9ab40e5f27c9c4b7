"""Reward model: the score that a sequence-classification model gives to a conversation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rayfuse.config import RewardModel
from rayfuse.data.prompts import Prompt
from rayfuse.data.template import ChatTemplate
from rayfuse.errors import ModelError
from rayfuse.models.loading import context_length, load_sequence_classifier, load_tokenizer


class RewardModelJudge:
    """Any Hugging Face sequence-classification model, read from safetensors.

    The conversation is rendered with the model's own chat template, the response as the last turn; a tokenizer without
    a template gets prompt and response as a pair of texts, as encoders are trained. What is too long for the model is
    cut from the left.
    """

    def __init__(self, config: RewardModel) -> None:
        """Load.

        Raises:
            ModelError: it cannot be loaded, or has several outputs and none is named.
        """
        self.config = config
        self.device = torch.device("cuda" if config.gpus else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(config.cpus)))
        self.tokenizer = load_tokenizer(config)
        self.template = ChatTemplate(self.tokenizer, config.template)
        self.model = load_sequence_classifier(config).to(self.device)
        self.context = context_length(self.model.config)
        self.label = self._find_label(self.model.config.num_labels)
        self.pad = self.model.config.pad_token_id
        # A model that reads its score at the last token finds it by the padding; without one, a row at a time.
        self.batch_size = 1 if self.pad is None else config.batch_size

    def _find_label(self, labels: int) -> int:
        if self.config.label is None and labels != 1:
            raise ModelError(f"{self.config.model} has {labels} outputs; say which is the score with judge.label")
        label = self.config.label or 0
        if label >= labels:
            raise ModelError(f"judge.label is {label}, but {self.config.model} has {labels} outputs")
        return label

    def token_ids(self, prompt: Prompt, response: str) -> list[int]:
        """What the model reads of one response."""
        if self.template.present:
            turns = [*prompt.sample.turns, {"role": "assistant", "content": response}]
            text = self.template.render(turns, prompt.sample.offered_tools, open_turn=False)
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = self.tokenizer.encode(prompt.sample.plain_text, response)
        return list(ids[-self.context :] if self.context else ids)

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The score of each pair, in order; the batches, of similar lengths, depend on the pairs alone."""
        ids = [self.token_ids(prompt, response) for prompt, response in pairs]
        scores = [0.0] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(ids[i]), i))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            T = max(len(ids[i]) for i in batch)
            input_ids_BT = torch.full((len(batch), T), self.pad or 0)
            mask_BT = torch.zeros(len(batch), T, dtype=torch.long)
            for b, i in enumerate(batch):
                input_ids_BT[b, : len(ids[i])] = torch.tensor(ids[i])
                mask_BT[b, : len(ids[i])] = 1
            logits_BC = self.model(
                input_ids=input_ids_BT.to(self.device), attention_mask=mask_BT.to(self.device)
            ).logits.float()
            if not torch.isfinite(logits_BC).all():
                raise ModelError(f"{self.config.model} gives scores that are not finite; try judge.dtype: float32")
            for i, score in zip(batch, logits_BC[:, self.label].tolist(), strict=True):
                scores[i] = score
        return scores
