"""The baselines in optimal transport, one class per method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayfuse.config.stages import Distillation


class Sinkhorn(Distillation):
    """Entropic optimal transport between the top-K distributions (Cuturi 2013; in distillation, WKD-L)."""

    method: Literal["sinkhorn"] = "sinkhorn"
    temperature: float = Field(1.0, gt=0, description="divides both sides' logits")
    regularisation: float = Field(0.05, gt=0, description="weight of the plan's entropy; towards 0: exact transport")
    iterations: int = Field(10, ge=1, description="Sinkhorn iterations")


class WassersteinKL(Distillation):
    """Wasserstein distance between the top-K distributions, mixed with their KL divergence, rank by rank."""

    method: Literal["wasserstein_kl"] = "wasserstein_kl"
    temperature: float = Field(1.0, gt=0, description="divides both sides' logits; KL is multiplied by its square")
    mix: float = Field(0.5, ge=0, le=1, description="share of the Wasserstein distance; 1 - mix is that of KL")


class MultiLevelOT(Distillation):
    """MultiLevelOT (arXiv 2412.14528): transport between tokens in one channel order, and between positions."""

    method: Literal["multilevelot"] = "multilevelot"
    channels: int = Field(50, ge=2, description="tokens compared, those with most mass in the micro-batch")
    ce_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy between channels")
    sequence_weight: float = Field(0.1, ge=0, description="weight of the Sinkhorn distance between positions")
