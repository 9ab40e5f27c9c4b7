"""The losses of fusion: pure torch functions that know nothing of Ray."""

from rayfuse.losses.divergence import UNUSED, advantage_losses, cell_logps, divergences, used_columns
from rayfuse.losses.fpo import fpo_loss, fuse_logps, fuse_pairs, wrpo_loss
from rayfuse.losses.fused_head import HeadOutput, fused_head
from rayfuse.losses.gld import gauge, gld_distance, gld_features, gld_loss
from rayfuse.losses.gw import gld_graphs, gw_couplings, gw_distance
from rayfuse.losses.standardize import standardize
from rayfuse.losses.token_logps import token_logps
from rayfuse.losses.topk import TeacherTopK, teacher_topk
from rayfuse.losses.uld import uld_distances, uld_loss

__all__ = [
    "UNUSED",
    "HeadOutput",
    "TeacherTopK",
    "advantage_losses",
    "cell_logps",
    "divergences",
    "fpo_loss",
    "fuse_logps",
    "fuse_pairs",
    "fused_head",
    "gauge",
    "gld_distance",
    "gld_features",
    "gld_graphs",
    "gld_loss",
    "gw_couplings",
    "gw_distance",
    "standardize",
    "teacher_topk",
    "token_logps",
    "uld_distances",
    "uld_loss",
    "used_columns",
    "wrpo_loss",
]
