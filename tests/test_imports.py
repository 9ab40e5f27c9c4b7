"""What is pure mathematics runs without Ray: on a bare GPU machine, say, where only torch and transformers are."""

import subprocess
import sys

import pytest

WITHOUT_RAY = [
    "rayfuse.losses",
    "rayfuse.prepare.preparer",
    "rayfuse.prepare.targets",
    "rayfuse.stages",
    "rayfuse.student.engines.ddp",
    "rayfuse.teachers.transformers",
    "tests.test_devices",
]


@pytest.mark.parametrize("module", WITHOUT_RAY)
def test_needs_no_ray(module):
    code = f"import sys; sys.modules['ray'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
