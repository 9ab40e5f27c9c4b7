"""DeepSpeed's engine where DeepSpeed is not."""

import sys

import pytest
import torch

from rayfuse.config import SFT, Student
from rayfuse.errors import StudentError
from rayfuse.student.engines.deepspeed import DeepSpeedEngine


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    student = Student(model="/not/there", engine="deepspeed", workers=2)
    with pytest.raises(StudentError, match=r"pip install 'rayfuse\[deepspeed\]'\); or use student.engine: fsdp2"):
        DeepSpeedEngine(student, student.model, SFT(), torch.device("cpu"))
