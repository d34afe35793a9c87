"""`gamma`: what the weights of a norm start at."""

import pytest
import torch

from norm_matters.core.errors import UserError
from norm_matters.norms import canonical_spec, create_norm


@pytest.mark.parametrize("spec", ["l1:gamma=0.25", "group:groups=2,gamma=0.25", "ghost:size=4,base=l1,gamma=0.25"])
def test_weights_start_at_gamma_and_outputs_are_scaled_by_it(spec: str) -> None:
    norm, plain = create_norm(spec, 4), create_norm(spec.replace("gamma=0.25", "gamma=1"), 4)
    assert torch.equal(norm.get_parameter("weight"), torch.full((4,), 0.25))
    assert torch.equal(plain.get_parameter("weight"), torch.ones(4))
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x), 0.25 * plain(x))
    assert "gamma=0.25" in canonical_spec(spec)
    assert "gamma" not in canonical_spec(spec.replace("gamma=0.25", "gamma=1"))


def test_a_constant_over_four_is_undone_by_gamma_at_the_start() -> None:
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    quarter = create_norm("l1:constant=0.25,gamma=0.25,eps=0", 4, dtype=torch.float64)
    assert torch.allclose(quarter(x), create_norm("l1:constant=1,eps=0", 4, dtype=torch.float64)(x))


@pytest.mark.parametrize("spec", ["l1:affine=false,gamma=2", "mean:gamma=2"])
def test_a_norm_without_weights_refuses_it(spec: str) -> None:
    with pytest.raises(UserError, match="gamma"):
        create_norm(spec, 4)


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_gamma_is_above_zero(value: str) -> None:
    with pytest.raises(UserError, match="gamma"):
        create_norm(f"l1:gamma={value}", 4)
