"""A run's configuration: one YAML file, checked as a whole before anything starts.

A value is valid or it raises; nothing is adjusted silently. Keys that do not exist are refused. The resolved
configuration (every default filled in) is what `config.json` in the run folder holds. This module imports neither
torch nor ray, so that `rayfuse --help` and a wrong key answer at once.

The shortest run:

    student: microsoft/phi-4
    teachers: [Qwen/Qwen2.5-14B-Instruct, mistralai/Mistral-Small-24B-Instruct-2501]
    data: train.jsonl
    stages: [infifusion]
    output: runs/phi4-fused
"""

from __future__ import annotations

from rayfuse.config.consensus import Consensus
from rayfuse.config.data import Benchmark, Data, Signals
from rayfuse.config.endpoint import Endpoint, Stored
from rayfuse.config.environment import RuntimeEnv
from rayfuse.config.judges import JUDGES, HostedJudge, Judge, Posterior, RewardModel, UnitTests
from rayfuse.config.loading import apply_override, config_json, load_config, parse_config
from rayfuse.config.models import Model, Student
from rayfuse.config.prefer import Prefer
from rayfuse.config.run import Cluster, Config
from rayfuse.config.section import Dtype, Place, Section
from rayfuse.config.serving import Http, Serving
from rayfuse.config.stages import STAGES
from rayfuse.config.stages.base import Distillation, Merge, RankDistillation, Stage, TeacherStage
from rayfuse.config.stages.baselines import (
    KL,
    ULD,
    FuseChat,
    FuseLLM,
    MiniLogit,
    MultiLevelOT,
    Sinkhorn,
    ULDHybrid,
    WassersteinKL,
)
from rayfuse.config.stages.fusion import SFT, ByteKD, InfiFusion, InfiGFusion, Trust
from rayfuse.config.stages.on_policy import OnPolicy
from rayfuse.config.stages.preferences import DPO, WRPO, FusedPreference, InfiFPO, Preference
from rayfuse.config.teachers import VLLM, Parity, Replicas, Teacher

__all__ = [
    "DPO",
    "JUDGES",
    "KL",
    "SFT",
    "STAGES",
    "ULD",
    "VLLM",
    "WRPO",
    "Benchmark",
    "ByteKD",
    "Cluster",
    "Config",
    "Consensus",
    "Data",
    "Distillation",
    "Dtype",
    "Endpoint",
    "FuseChat",
    "FuseLLM",
    "FusedPreference",
    "HostedJudge",
    "Http",
    "InfiFPO",
    "InfiFusion",
    "InfiGFusion",
    "Judge",
    "Merge",
    "MiniLogit",
    "Model",
    "MultiLevelOT",
    "OnPolicy",
    "Parity",
    "Place",
    "Posterior",
    "Prefer",
    "Preference",
    "RankDistillation",
    "Replicas",
    "RewardModel",
    "RuntimeEnv",
    "Section",
    "Serving",
    "Signals",
    "Sinkhorn",
    "Stage",
    "Stored",
    "Student",
    "Teacher",
    "TeacherStage",
    "Trust",
    "ULDHybrid",
    "UnitTests",
    "WassersteinKL",
    "apply_override",
    "config_json",
    "load_config",
    "parse_config",
]
