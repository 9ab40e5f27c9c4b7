"""z-scores against scipy's, and the cases without a deviation."""

import pytest
import scipy.stats
import torch

from rayfuse.errors import LossError
from rayfuse.losses import standardize


def test_equals_scipy_zscore():
    values = torch.randn(5, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9 + 30
    torch.testing.assert_close(standardize(values, eps=0.0).numpy(), scipy.stats.zscore(values, axis=-1, ddof=1))


def test_does_not_depend_on_shift_or_sharpness():
    values = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(standardize(3.0 * values - 17.0), standardize(values), rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    values = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).bfloat16()
    result = standardize(values)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, standardize(values.double()).float(), rtol=1e-5, atol=1e-6)


def test_gradient_flows_through_mean_and_deviation():
    values = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(standardize, (values,))


def test_a_constant_row_becomes_zeros_with_a_zero_gradient():
    values = torch.full((2, 4), 5.0, requires_grad=True)
    result = standardize(values)
    result.square().sum().backward()
    assert (result == 0).all()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), ()])
def test_refuses_fewer_than_two_values(shape):
    with pytest.raises(LossError, match="at least 2 values"):
        standardize(torch.zeros(shape))
