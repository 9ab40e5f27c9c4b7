"""The losses of fusion: pure torch functions that know nothing of Ray."""

from rayfuse.losses.fused_head import HeadOutput, fused_head
from rayfuse.losses.standardize import standardize
from rayfuse.losses.topk import TeacherTopK, teacher_topk
from rayfuse.losses.uld import uld_loss

__all__ = ["HeadOutput", "TeacherTopK", "fused_head", "standardize", "teacher_topk", "uld_loss"]
