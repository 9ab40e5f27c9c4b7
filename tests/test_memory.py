"""Peak memory of teacher and student, measured in processes of their own, against a formula without B x T x V."""

import json
import subprocess
import sys

import pytest

B, T, V, H, K = 8, 480, 60_000, 64, 10
FULL_LOGITS = B * T * V * 4

SCRIPT = r"""
import json, re, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
B, T, V, H, K = {sizes}
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=2 * H, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2 * T, tie_word_embeddings=False))
ids = torch.randint(0, V, (B, T))
def peak():
    # Not ru_maxrss, which a process takes over from the one that started it: a large pytest would hide the growth.
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
{body}
print(json.dumps(peak() - before))
"""

TEACHER = """
from rayfuse.losses import teacher_topk
def score():
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids[:, :{t}], use_cache=False).last_hidden_state.flatten(0, 1)
        return teacher_topk(hidden, model.lm_head.weight, ids[:, :{t}].flatten(), K)
teacher_topk(torch.randn(4, H), model.lm_head.weight.detach(), torch.zeros(4, dtype=torch.long), K)
before = peak()
score()
"""

STUDENT = """
from rayfuse.losses import fused_head, uld_loss
teacher = torch.randn(B * T, K).log_softmax(-1).sort(descending=True).values
def step(hidden, labels, teacher):
    head = fused_head(hidden, model.lm_head.weight, labels, K)
    (head.loss_ce + uld_loss(head.topk, teacher)).backward()
step(torch.randn(4, H, requires_grad=True), torch.zeros(4, dtype=torch.long), teacher[:4])
model.zero_grad()
before = peak()
hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
step(hidden, ids.flatten(), teacher)
"""

NAIVE = """
before = peak()
with torch.inference_mode():
    model(input_ids=ids).logits.log_softmax(-1).topk(K)
"""


def _peak(body: str) -> int:
    script = SCRIPT.format(sizes=(B, T, V, H, K), body=body.replace("{t}", str(T)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CHUNK = 64 * 2**20
WEIGHTS = V * H * 4
ACTIVATIONS = 40 * B * T * H * 4
SLACK = 64 * 2**20


@pytest.mark.parametrize(
    ("body", "bound"),
    [
        # Two chunks of logits at a time, and the activations of one layer.
        (TEACHER, 2 * CHUNK + ACTIVATIONS + SLACK),
        # The same, with the gradients of embedding and head, in float32 and as they are added up.
        (STUDENT, 3 * CHUNK + 4 * WEIGHTS + ACTIVATIONS + SLACK),
    ],
    ids=["teacher", "student"],
)
def test_peak_memory_stays_below_the_formula(body, bound):
    measured = _peak(body)
    assert measured < bound, f"{measured / 2**20:.0f} MiB, the formula allows {bound / 2**20:.0f}"
    assert bound < FULL_LOGITS


def test_the_measure_sees_full_logits():
    """The same measurement of transformers' own full logits is above their size: it can fail."""
    assert _peak(NAIVE) > FULL_LOGITS
