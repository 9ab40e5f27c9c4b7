"""The baselines: related methods that the papers compare with, one class per method."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from rayfuse.config.stages.base import LAM_TEXT, Distillation, Merge, TeacherStage, distance_part
from rayfuse.config.stages.fusion import MIXTURE_PARTS, ULD_PART
from rayfuse.metrics.definitions import SFT_PART, Metric


class KL(Distillation):
    """Knowledge distillation (arXiv 1503.02531) on the tokens that teacher and student share."""

    targets: ClassVar[tuple[str, ...]] = ("ranks", "tokens")
    parts: ClassVar[tuple[Metric, ...]] = (
        SFT_PART,
        distance_part("loss_kl", "divergence, nats per aligned position"),
    )

    method: Literal["kl"] = "kl"
    lam: float = Field(0.05, ge=0, le=1, description=LAM_TEXT)
    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward", description="KL(teacher || student), KL(student || teacher), or the mean of both to their mixture"
    )
    temperature: float = Field(
        1.0, gt=0, description="divides both sides' logits; the loss is multiplied by its square"
    )

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        kind = {"forward": "forward KL", "reverse": "reverse KL", "jsd": "Jensen-Shannon"}[self.divergence]
        distance = f"{kind} divergence over the teachers' top-{self.kept(signals_k)} tokens that the student has too"
        return f"`kl`: {self.mixture_text(f'{distance} (temperature {self.temperature:g})')}."


class MiniLogit(Distillation):
    """Regression of the student's logits on the teacher's, on the tokens that the two share."""

    targets: ClassVar[tuple[str, ...]] = ("ranks", "tokens")
    parts: ClassVar[tuple[Metric, ...]] = (SFT_PART, distance_part("loss_mse", "mean square over shared tokens"))

    method: Literal["minilogit"] = "minilogit"
    lam: float = Field(0.015, ge=0, le=1, description=LAM_TEXT)

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = f"squared distance of the centred logits of the teachers' top-{self.kept(signals_k)} tokens"
        return f"`minilogit`: {self.mixture_text(f'{distance} that the student has too')}."


class ULD(Distillation):
    """Universal logit distillation (arXiv 2402.12030): sorted probabilities, rank by rank, position t with t."""

    lse_gradient: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (SFT_PART, ULD_PART)

    method: Literal["uld"] = "uld"
    lam: float = Field(0.2, ge=0, le=1, description=f"{LAM_TEXT}; the authors' 1.5 to 1 is 0.6")
    alignment: Literal["bytes", "position"] = Field(
        "position", description="pair positions t with t as the original does, or where equally many bytes were read"
    )

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = f"L1 distance between the sorted top-{self.kept(signals_k)} probabilities of teacher and student"
        return f"`uld` (ULD, [arXiv 2402.12030](https://arxiv.org/abs/2402.12030)): {self.mixture_text(distance)}."


class ULDHybrid(Distillation):
    """ULD with matched tokens, as in TRL's GOLD trainer: JSD on shared tokens, sorted probabilities on the rest."""

    targets: ClassVar[tuple[str, ...]] = ("ranks", "tokens", "unmatched")
    lse_gradient: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (
        SFT_PART,
        distance_part("loss_hybrid", "JSD of shared tokens and ranks of the others"),
    )

    method: Literal["uld_hybrid"] = "uld_hybrid"
    lam: float = Field(0.5, ge=0, le=1, description=f"{LAM_TEXT}; GOLD, which has no SFT term, is 1")
    beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher in JSD's mixture")
    matched_weight: float | None = Field(
        None, ge=0, le=1, description="weight of JSD beside the ranks; default: share of the teacher's tokens matched"
    )

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = (
            f"Jensen-Shannon divergence over shared tokens and the sorted L1 distance of the others, both within the "
            f"top-{self.kept(signals_k)}"
        )
        return f"`uld_hybrid` (ULD with matched tokens, as in TRL's GOLD): {self.mixture_text(distance)}."


CHOSEN = Metric("chosen", "samples that take each teacher's distribution", "samples of a step", per_teacher=True)


class FuseLLM(TeacherStage):
    """FuseLLM (arXiv 2401.10491): per sample the best teacher's distribution, mapped by minimum edit distance."""

    targets: ClassVar[tuple[str, ...]] = ("mined",)
    partial: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (*MIXTURE_PARTS, CHOSEN)
    weighs_teachers: ClassVar[bool] = False

    method: Literal["fusellm"] = "fusellm"
    lam: float = Field(0.1, ge=0, le=1, description="share of the teacher in the target; 1 - lam is the written text's")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        return _fusellm_text(self, "FuseLLM", "2401.10491", signals_k)


class FuseChat(TeacherStage):
    """FuseChat (arXiv 2408.07990): FuseLLM with a student per teacher, merged by SCE."""

    targets: ClassVar[tuple[str, ...]] = ("mined",)
    partial: ClassVar[bool] = True
    parts: ClassVar[tuple[Metric, ...]] = (*MIXTURE_PARTS, CHOSEN)
    weighs_teachers: ClassVar[bool] = False

    method: Literal["fusechat"] = "fusechat"
    lam: float = Field(0.1, ge=0, le=1, description="share of the teacher in the target; 1 - lam is the written text's")
    merge: Merge | None = Field(Merge(method="sce"), description="how the students become one model")

    @field_validator("merge")
    @classmethod
    def _merged(cls, value: Merge | None) -> Merge:
        if value is None:
            raise ValueError("is how the students become one model; for one student of all teachers use fusellm")
        return value

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        return _fusellm_text(self, "FuseChat", "2408.07990", signals_k)


class Sinkhorn(Distillation):
    """Entropic optimal transport between the top-K distributions (Cuturi 2013; in distillation, WKD-L)."""

    parts: ClassVar[tuple[Metric, ...]] = (SFT_PART, distance_part("loss_ot", "transport cost between ranks"))

    method: Literal["sinkhorn"] = "sinkhorn"
    lam: float = Field(0.5, ge=0, le=1, description=LAM_TEXT)
    temperature: float = Field(1.0, gt=0, description="divides both sides' logits")
    regularisation: float = Field(0.05, gt=0, description="weight of the plan's entropy; towards 0: exact transport")
    iterations: int = Field(10, ge=1, description="Sinkhorn iterations")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = (
            f"Sinkhorn distance (entropy {self.regularisation:g}, {self.iterations} iterations) between the ranks of "
            f"the top-{self.kept(signals_k)} probabilities of teacher and student (temperature {self.temperature:g})"
        )
        return f"`sinkhorn`: {self.mixture_text(distance)}."


class WassersteinKL(Distillation):
    """Wasserstein distance between the top-K distributions, mixed with their KL divergence, rank by rank."""

    parts: ClassVar[tuple[Metric, ...]] = (SFT_PART, distance_part("loss_wkl", "transport cost and KL between ranks"))

    method: Literal["wasserstein_kl"] = "wasserstein_kl"
    lam: float = Field(0.2, ge=0, le=1, description=LAM_TEXT)
    temperature: float = Field(1.0, gt=0, description="divides both sides' logits; KL is multiplied by its square")
    mix: float = Field(0.5, ge=0, le=1, description="share of the Wasserstein distance; 1 - mix is that of KL")

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = (
            f"mixture of {self.mix:g} x Wasserstein and {1 - self.mix:g} x KL between the ranks of the "
            f"top-{self.kept(signals_k)} probabilities of teacher and student (temperature {self.temperature:g})"
        )
        return f"`wasserstein_kl`: {self.mixture_text(distance)}."


class MultiLevelOT(Distillation):
    """MultiLevelOT (arXiv 2412.14528): transport between tokens in one channel order, and between positions."""

    targets: ClassVar[tuple[str, ...]] = ("ranks", "teacher_ids")
    parts: ClassVar[tuple[Metric, ...]] = (
        SFT_PART,
        distance_part("loss_ot", "L1, cross-entropy and transport of channels"),
    )

    few: ClassVar[str] = "two logits divided by their deviation always differ by 1.41"

    method: Literal["multilevelot"] = "multilevelot"
    lam: float = Field(0.25, ge=0, le=1, description=LAM_TEXT)
    channels: int = Field(50, ge=2, description="tokens compared, those with most mass in the micro-batch")
    ce_weight: float = Field(0.1, ge=0, description="weight of the cross-entropy between channels")
    sequence_weight: float = Field(0.1, ge=0, description="weight of the Sinkhorn distance between positions")

    @property
    def least_k(self) -> int:
        """The fewest ranks with which the loss depends on what the models say."""
        return 3

    def text(self, signals_k: int) -> str:
        """The method's sentence in the model card."""
        distance = (
            f"L1 distance between the scaled top-{self.kept(signals_k)} distributions over the {self.channels} tokens "
            f"of most mass, with {self.ce_weight:g} x a cross-entropy and {self.sequence_weight:g} x a Sinkhorn "
            "distance between positions"
        )
        paper = "[arXiv 2412.14528](https://arxiv.org/abs/2412.14528)"
        return f"`multilevelot` (MultiLevelOT, {paper}): {self.mixture_text(distance)}."


def _fusellm_text(stage: FuseLLM | FuseChat, name: str, paper: str, signals_k: int) -> str:
    sft, lam, chosen = stage.weights_text
    return (
        f"`{stage.method}` ({name}, [arXiv {paper}](https://arxiv.org/abs/{paper})): {sft} x cross-entropy + {lam} x "
        f"cross-entropy against the top-{signals_k} probabilities of each sample's best teacher, mapped by minimum "
        f"edit distance{chosen}."
    )
