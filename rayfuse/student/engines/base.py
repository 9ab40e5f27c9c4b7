"""What an engine is: the contract between the training loop and whatever holds the student's weights.

An engine may keep the whole model on every rank (DDP) or a part of it on each (ZeRO-3, FSDP2). The loop does not know
which. So every method marked *collective* is called by all ranks, in the same order, and may exchange tensors; what it
returns may differ from rank to rank.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rayfuse.batch import FusionBatch
from rayfuse.config import Stage, Student
from rayfuse.losses import HeadOutput
from rayfuse.student.checkpoint import State


class Engine(Protocol):
    """A student in training: float32 master weights, their optimiser, and one forward through model and fused head.

    Where the stage compares the policy with a reference (`stage.uses_preferences`), the forward is deterministic: no
    dropout, for the reference has none.
    """

    def __init__(self, student: Student, path: str, stage: Stage, device: torch.device) -> None:
        """Load the model that the stage starts from. Collective.

        Args:
            student: number formats, gradient checkpointing, router loss.
            path: folder or id of the model that the stage starts from.
            stage: optimiser, clipping, and whether the forward has dropout.
            device: where this rank computes.

        Raises:
            ModelError: the model cannot be loaded or trained.
        """

    @staticmethod
    def backend(student: Student) -> str:
        """The backend of torch.distributed that the ranks talk by, for example "nccl"."""

    def score(self, batch: FusionBatch, k: int, *, lse: bool = False) -> HeadOutput:
        """Cross-entropy and top k of a micro-batch's N positions.

        Args:
            batch: the micro-batch.
            k: ranks.
            lse: the head's log-sum-exp is differentiable, for losses on probabilities.
        """

    def log_probabilities(self, batch: FusionBatch) -> torch.Tensor:
        """Differentiable log-probabilities [N] of the labels.

        A preference loss weighs a response by how the whole pair scored, so it needs them in place of `score`.
        """

    def router_loss(self) -> torch.Tensor | None:
        """The load-balancing loss of the last forward, times its coefficient; None where the student has no router.

        It is a mean over the real tokens of the micro-batch (padding left out), as transformers computes it.
        """

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; the losses of all micro-batches and ranks are shares of one sum."""

    def accumulate(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last` of the step on this rank."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients. Collective.

        Returns:
            The norm of the whole gradient before clipping, the same on all ranks.

        Raises:
            StudentError: it is not finite.
        """

    def take_gradient_norm(self) -> float:
        """The norm of the whole gradient, the same on all ranks; it is cleared, and no weight changes. Collective."""

    def sum_over_workers(self, values: np.ndarray) -> np.ndarray:
        """float64 values summed over the ranks. Collective."""

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""

    def state(self) -> State:
        """This rank's part of a checkpoint: weights and optimiser. Collective.

        No two ranks return a file of the same name; a rank that has nothing to write returns an empty mapping.
        """

    def load_state(self, state: State) -> None:
        """The inverse of `state`, from the files of all ranks, also where there were more or fewer. Collective.

        Raises:
            StudentError: the tensors are not those of this model.
        """

    def whole_model(self) -> contextlib.AbstractContextManager[Any]:
        """The transformers model with all its weights on this rank, to write with: in evaluation mode, without
        gradients, in the student's number format. Collective; the training goes on after it as if nothing had been.
        """

    def export(self, folder: Path) -> None:
        """Write a complete Hugging Face model into `folder`, its weights in float32. Collective.

        safetensors, configuration, tokenizer, chat template, generation configuration. All files are there when the
        call has returned on every rank.
        """
