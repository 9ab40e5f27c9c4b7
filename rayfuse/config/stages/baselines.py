"""The baselines: related methods that the papers compare with, one class per method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rayfuse.config.stages.base import Distillation, Merge, TeacherStage


class KL(Distillation):
    """Knowledge distillation (arXiv 1503.02531) on the tokens that teacher and student share."""

    method: Literal["kl"] = "kl"
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward", description="KL(teacher || student), KL(student || teacher), or the mean of both to their mixture"
    )
    temperature: float = Field(
        1.0, gt=0, description="divides both sides' logits; the loss is multiplied by its square"
    )


class MiniLogit(Distillation):
    """Regression of the student's logits on the teacher's, on the tokens that the two share."""

    method: Literal["minilogit"] = "minilogit"


class ULD(Distillation):
    """Universal logit distillation (arXiv 2402.12030): sorted probabilities, rank by rank, position t with t."""

    method: Literal["uld"] = "uld"
    lam: float = Field(
        0.6, ge=0, le=1, description="weight of the distillation term, 1 - lam is that of the SFT term; 0.6: 1.5 to 1"
    )
    alignment: Literal["bytes", "position"] = Field(
        "position", description="pair positions t with t as the original does, or where equally many bytes were read"
    )


class ULDHybrid(Distillation):
    """ULD with matched tokens, as in TRL's GOLD trainer: JSD on shared tokens, sorted probabilities on the rest."""

    method: Literal["uld_hybrid"] = "uld_hybrid"
    lam: float = Field(
        1.0, ge=0, le=1, description="weight of the distillation term, 1 - lam is that of the SFT term; GOLD has none"
    )
    beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in JSD's mixture")
    matched_weight: float | None = Field(
        None, ge=0, le=1, description="weight of JSD beside the ranks; default: share of the teacher's tokens matched"
    )


class FuseLLM(TeacherStage):
    """FuseLLM (arXiv 2401.10491): per sample the best teacher's distribution, mapped by minimum edit distance."""

    method: Literal["fusellm"] = "fusellm"
    lam: float = Field(0.1, ge=0, le=1, description="share of the teacher in the target; 1 - lam is the written text's")


class FuseChat(TeacherStage):
    """FuseChat (arXiv 2408.07990): FuseLLM with a student per teacher, merged by SCE."""

    method: Literal["fusechat"] = "fusechat"
    lam: float = Field(0.1, ge=0, le=1, description="share of the teacher in the target; 1 - lam is the written text's")
    merge: Merge | None = Field(Merge(method="sce"), description="how the students become one model")

    @field_validator("merge")
    @classmethod
    def _merged(cls, value: Merge | None) -> Merge:
        if value is None:
            raise ValueError("is how the students become one model; for one student of all teachers use fusellm")
        return value


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
