"""Log-probabilities as engines give them, made into signals; the oracle is torch's log_softmax and topk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.data.render import Rendered
from rayfuse.errors import SignalError
from rayfuse.teachers.logprobs import signals_from_logprobs
from rayfuse.teachers.vllm.backend import response_signals

V = 40


class Flat:
    """vLLM's FlatLogprobs, as its docstring describes it: lists over all candidates, and where a position's begin."""

    def __init__(self, logits_TV: torch.Tensor, tokens: list[int], k: int) -> None:
        logps_TV = logits_TV.log_softmax(-1)
        self.start_indices, self.end_indices, self.token_ids, self.logprobs = [0], [0], [], []
        for t, token in enumerate(tokens[1:]):
            top = logps_TV[t].topk(k)
            self.start_indices.append(len(self.token_ids))
            self.token_ids += [token, *top.indices.tolist()]
            self.logprobs += [float(logps_TV[t, token]), *top.values.tolist()]
            self.end_indices.append(len(self.token_ids))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), prompt=st.integers(1, 5), response=st.integers(0, 6), k=st.integers(1, 7))
def test_rows_of_the_response_equal_torch(seed, prompt, response, k):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (prompt + response + 1,), generator=generator).tolist()
    # Few different values: ties within and at the edge of the kept ones.
    logits_TV = torch.randint(0, 9, (len(tokens) - 1, V), generator=generator).float() / 2
    rendered = Rendered(
        np.array(tokens[:prompt]), np.array(tokens[prompt:]), np.arange(1, response + 1, dtype=np.int64)
    )
    signals = response_signals(Flat(logits_TV, tokens, k), rendered, k, V)
    logps_LV = logits_TV[prompt - 1 :].log_softmax(-1)
    assert len(signals) == response + 1
    np.testing.assert_array_equal(signals.logps, logps_LV.topk(k).values.numpy().astype(np.float16))
    picked = logps_LV.gather(1, torch.from_numpy(signals.ids.astype(np.int64)))
    np.testing.assert_array_equal(picked.numpy().astype(np.float16), signals.logps)
    assert all(len(set(row)) == k for row in signals.ids.tolist())
    following = logps_LV[range(response + 1), tokens[prompt:]]
    np.testing.assert_allclose(signals.token_logps, following.numpy(), atol=1e-6)
    assert np.isnan(signals.lse).all()


def _row(ids, logps, k=2, vocab_size=V, next_logp=-1.0):
    return signals_from_logprobs(
        np.array([next_logp]), np.array([ids]), np.array([logps]), np.zeros(0, np.int64), k=k, vocab_size=vocab_size
    )


def test_a_token_that_stands_twice_is_kept_once():
    signals = _row([7, 3, 7, 9], [-0.5, -2.0, -0.5, -3.0], k=3)
    assert signals.ids.tolist() == [[7, 3, 9]]
    np.testing.assert_array_equal(signals.logps, np.array([[-0.5, -2.0, -3.0]], np.float16))


def test_equal_candidates_keep_the_order_in_which_they_came():
    assert _row([5, 4, 6], [-1.5, -1.5, -1.5]).ids.tolist() == [[5, 4]]


def test_padding_of_the_vocabulary_and_fillers_are_left_out():
    signals = _row([30, 3, 9, -1], [-0.1, -3.0, -4.0, 0.0], vocab_size=30)
    assert signals.ids.tolist() == [[3, 9]]


def test_too_few_candidates_are_an_error_that_says_how_many():
    with pytest.raises(SignalError, match=r"row 0 has 1 different tokens below 30, not 2: \[30, 3, 3\]"):
        _row([30, 3, 3], [-0.1, -3.0, -3.0], vocab_size=30)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_value_that_is_no_number_is_refused(bad):
    with pytest.raises(SignalError, match="not finite"):
        _row([1, 2], [bad, -1.0])
    with pytest.raises(SignalError, match="not finite"):
        _row([1, 2], [-2.0, -1.0], next_logp=bad)


def test_more_mass_than_one_is_refused():
    with pytest.raises(SignalError, match="add up to more than 1"):
        _row([1, 2], [-0.1, -0.2])
