"""The specification against itself: autograd's gradients against the explicit formulas, in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import dual_lora_delta, reference
from dual_lora_kernels.self_check.problems import autograd_gradients, gaussian, relative_error
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

sizes = st.integers(1, 40)
ranks = st.integers(1, 9)


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
@given(m=st.integers(0, 20), n=sizes, k=sizes, r1=ranks, r2=ranks, seed=st.integers(0, 1000))
def test_explicit_gradients_are_autograds(ste: str, m: int, n: int, k: int, r1: int, r2: int, seed: int) -> None:
    problem = gaussian(m, n, k, r1, r2, dtype=torch.float64, seed=seed)
    _, *expected = autograd_gradients(problem, ste=ste)
    computed = reference.linear_gradients(problem.grad, problem.x, problem.weight, *problem.factors, ste=ste)
    for name, value, truth in zip(computed._fields, computed, expected, strict=True):
        assert relative_error(value, truth) < 1e-12, name


def test_gradients_of_the_smooth_part_by_finite_differences() -> None:
    """Away from the kinks, the gradients of x, W0, A, B and b are true derivatives."""
    problem = gaussian(3, 5, 4, 2, 3, dtype=torch.float64).requiring_grad()

    def smooth(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, A, B, bias = tensors
        return reference.linear(x, weight, A, B, problem.C.detach(), problem.D.detach(), problem.scale, bias)

    assert torch.autograd.gradcheck(smooth, (problem.x, problem.weight, problem.A, problem.B, problem.bias))


def test_sign_is_the_papers() -> None:
    """+1 for positive, −1 otherwise: also for both zeros and NaN."""
    q = torch.tensor([1e-45, 2.0, 0.0, -0.0, -1e-45, -3.0, torch.nan])
    assert reference.sign(q).tolist() == [1, 1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("ste", "expected"),
    [("clip", [-1.0, -0.5, 1.0, 1.0]), ("dorefa", [-2.0, -0.5, 1.0, 3.0]), ("xnor", [0.0, -0.5, 1.0, 0.0])],
)
def test_estimators(ste: str, expected: list[float]) -> None:
    grad, q = torch.tensor([-2.0, -0.5, 1.0, 3.0]), torch.tensor([-1.5, 0.5, -1.0, 1.1])
    assert reference.estimator_gradient(grad, q, ste).tolist() == expected


def test_clip_bound() -> None:
    grad = torch.tensor([-2.0, 0.1, 2.0])
    assert reference.estimator_gradient(grad, grad, "clip", 0.25).tolist() == [-0.25, pytest.approx(0.1), 0.25]


def test_zero_magnitude_stops_both_groups() -> None:
    """ReLU'(0) = 0: where P ≤ 0 nothing flows to either group, so zero factors never leave zero."""
    problem = gaussian(6, 5, 4, 2, 2, dtype=torch.float64)
    grads = reference.linear_gradients(
        problem.grad, problem.x, problem.weight, problem.A, problem.B * 0, problem.C, problem.D, problem.scale
    )
    assert all(not g.any() for g in (grads.A, grads.B, grads.C, grads.D))


def test_delta_is_the_papers_formula() -> None:
    """Against the definition written out with NumPy-like loops, element by element."""
    problem = gaussian(1, 6, 7, 3, 2, dtype=torch.float64)
    delta = dual_lora_delta(problem.A, problem.B, problem.C, problem.D, problem.scale)
    for n in range(6):
        for k in range(7):
            p = sum(problem.B[n, i] * problem.A[i, k] for i in range(3))
            q = sum(problem.D[n, i] * problem.C[i, k] for i in range(2))
            expected = problem.scale * max(p, torch.zeros(())) * (1 if q > 0 else -1)
            assert delta[n, k] == pytest.approx(expected.item(), rel=1e-12)
