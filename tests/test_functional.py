"""`dual_lora_linear` on the inputs people have: shapes, strides, dtypes, autocast and subsets of requires_grad."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import (
    dual_lora_delta,
    dual_lora_linear,
    dual_lora_merge_,
    reference,
    settings,
    strategy,
)
from dual_lora_kernels.self_check.problems import FUSED_RANK, Problem, autograd_gradients, gaussian, relative_error
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

LOW = [torch.bfloat16, torch.float16]
sizes = st.integers(1, 30)
NAMES = reference.Gradients._fields


def _run(problem: Problem, **options: object) -> list[torch.Tensor]:
    """(output, *gradients) of `dual_lora_linear`."""
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias, **options)
    return [out.detach(), *torch.autograd.grad(out, leaf.differentiable, leaf.grad)]


@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
@given(m=st.integers(0, 20), n=sizes, k=sizes, r1=st.integers(1, 20), r2=st.integers(1, 20), seed=st.integers(0, 1000))
def test_gradients_against_autograd_in_fp64(
    device: torch.device, backend: str, ste: str, m: int, n: int, k: int, r1: int, r2: int, seed: int
) -> None:
    if strategy() == "fused":
        r1, r2 = min(r1, FUSED_RANK), min(r2, FUSED_RANK)
    problem = gaussian(m, n, k, r1, r2, dtype=torch.float64, device=device, seed=seed)
    expected = autograd_gradients(problem, ste=ste)
    for name, value, truth in zip(("output", *NAMES), _run(problem, ste=ste, backend=backend), expected, strict=True):
        assert relative_error(value, truth) < 1e-12, name


@given(lead=st.lists(st.integers(0, 4), max_size=3))
def test_leading_dimensions(device: torch.device, backend: str, lead: list[int]) -> None:
    """0 to 3 leading dimensions, of any size, like F.linear."""
    problem = gaussian(1, 7, 5, 2, 3, dtype=torch.float64, device=device)
    x = torch.randn(*lead, 5, dtype=torch.float64, device=device, requires_grad=True)
    out = dual_lora_linear(x, problem.weight, *problem.factors, problem.bias, backend=backend)
    expected = reference.linear(x, problem.weight, *problem.factors, problem.bias)
    assert out.shape == (*lead, 7)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (truth,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, truth, rtol=1e-12, atol=1e-12)


def _strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "transposed":
        return tensor.t().contiguous().t()
    wide = torch.zeros(tensor.shape[0] * 2, tensor.shape[1] * 3, dtype=tensor.dtype, device=tensor.device)
    view = wide[::2, 1::3]
    return view.copy_(tensor)


@pytest.mark.parametrize("how", ["transposed", "sliced"])
@pytest.mark.parametrize("which", ["x", "weight", "A", "B", "C", "D", "grad"])
def test_strided_tensors(device: torch.device, backend: str, which: str, how: str, small_workspace: int) -> None:
    problem = gaussian(9, 60, 70, 4, 3, dtype=torch.float64, device=device)
    expected = _run(problem, backend=backend)
    tensors = {name: getattr(problem, name) for name in ("x", "weight", "A", "B", "C", "D", "grad")}
    tensors[which] = _strided(tensors[which], how)
    assert not tensors[which].is_contiguous()
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "grad"}
    bias = problem.bias.clone().requires_grad_()
    out = dual_lora_linear(
        *(leaves[n] for n in ("x", "weight", "A", "B", "C", "D")), problem.scale, bias, backend=backend
    )
    computed = [out, *torch.autograd.grad(out, [*leaves.values(), bias], tensors["grad"])]
    for name, value, truth in zip(("output", *NAMES), computed, expected, strict=True):
        assert relative_error(value, truth) < 1e-12, name


def test_strided_bias(device: torch.device, backend: str) -> None:
    """A column of a table, and one number for all."""
    problem = gaussian(3, 20, 5, 2, 2, dtype=torch.float64, device=device)
    table = torch.randn(20, 3, dtype=torch.float64, device=device)
    for bias in (table[:, 1], table[:1, 0].expand(20)):
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, bias, backend=backend)
        expected = reference.linear(problem.x, problem.weight, *problem.factors, bias)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_the_output_may_be_changed_in_place(device: torch.device, backend: str) -> None:
    """As `nn.ReLU(inplace=True)` or ``y += residual`` after the layer do."""
    problem = gaussian(3, 20, 5, 2, 2, device=device).requiring_grad()
    out = dual_lora_linear(problem.x, problem.weight.detach(), *problem.factors, backend=backend)
    torch.relu_(out.add_(1))
    assert torch.autograd.grad(out.sum(), problem.x)[0].isfinite().all()


def test_merging_between_forward_and_backward_is_noticed(device: torch.device, backend: str) -> None:
    """Backward would use the merged weight with the update on top."""
    problem = gaussian(3, 20, 5, 2, 2, device=device).requiring_grad()
    weight = problem.weight.detach()
    out = dual_lora_linear(problem.x, weight, *problem.factors, backend=backend)
    dual_lora_merge_(weight, *problem.factors, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_clip_bounds(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """A bound that fp32 cannot hold: fp64 layers clip at exactly it."""
    problem = gaussian(9, 20, 30, 3, 4, dtype=dtype, device=device)
    expected = autograd_gradients(problem.to(torch.float64), clip_bound=0.1)
    computed = _run(problem, clip_bound=0.1, backend=backend)
    for name, value, truth in zip(("output", *NAMES), computed, expected, strict=True):
        assert relative_error(value, truth) < 100 * torch.finfo(dtype).eps, name


def test_expanded_input_and_gradient(device: torch.device, backend: str) -> None:
    """Strides of zero, as `expand` and `sum().backward()` make them."""
    problem = gaussian(1, 6, 5, 2, 2, dtype=torch.float64, device=device)
    x = problem.x.clone().requires_grad_()
    out = dual_lora_linear(x.expand(8, 5), problem.weight, *problem.factors, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x)
    weight = reference.effective_weight(problem.weight, *problem.factors, torch.float64, "nearest")
    torch.testing.assert_close(out, (problem.x @ weight.t()).expand(8, 6), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, 8 * weight.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "needs", list(product([False, True], repeat=7))[1:], ids=lambda n: "".join(map("01"[0:2].__getitem__, n))
)
def test_every_subset_of_requires_grad(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Right gradients where wanted, none elsewhere, and no product that nobody asked for."""
    problem = gaussian(5, 8, 7, 2, 3, dtype=torch.float64)
    truth = dict(zip(NAMES, autograd_gradients(problem)[1:], strict=True))
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(problem.differentiable, needs, strict=True)]
    x, weight, A, B, C, D, bias = leaves
    asked: list[list[bool]] = []
    with _recorded_wishes(asked):
        out = dual_lora_linear(x, weight, A, B, C, D, problem.scale, bias)
        out.backward(problem.grad)
    for name, leaf, need in zip(NAMES, leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
        if leaf.grad is not None:
            assert relative_error(leaf.grad, truth[name]) < 1e-12, name
    wanted = [needs[0], *needs[2:6], needs[1]]
    assert asked == ([wanted] if any(wanted) else [])


def _recorded_wishes(asked: list[list[bool]]):
    """A mode that notes which gradients the `gradients` operator is asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "dual_lora_kernels" and func._opname == "gradients":
                asked.append(list(args[5]))
            return func(*args, **(kwargs or {}))

    return Recorder()


def test_input_is_not_kept_when_only_the_input_needs_a_gradient() -> None:
    problem = gaussian(5, 8, 7, 2, 3)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dual_lora_linear(problem.x.requires_grad_(), problem.weight, *problem.factors)
    assert all(t.data_ptr() != problem.x.data_ptr() for t in saved)
    assert saved


@pytest.mark.parametrize("input_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("weight_dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("factor_dtype", [torch.float32, *LOW])
def test_mixed_dtypes(
    device: torch.device,
    backend: str,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    small_workspace: int,
) -> None:
    """The output has the input's dtype, every gradient its tensor's; values follow the reference."""
    problem = gaussian(40, 50, 60, 4, 4, device=device)
    leaf = Problem(
        problem.x.to(input_dtype),
        problem.weight.to(weight_dtype),
        *(f.to(factor_dtype) for f in problem.factors[:4]),
        problem.bias.to(weight_dtype),
        problem.scale,
        problem.grad.to(input_dtype),
    )
    computed, expected = _run(leaf, backend=backend), autograd_gradients(leaf)
    assert computed[0].dtype == input_dtype
    for name, value, truth, tensor in zip(NAMES, computed[1:], expected[1:], leaf.differentiable, strict=True):
        assert value.dtype == tensor.dtype, name
        # Autograd's H is rounded to the compute dtype, ours is not: they agree to that rounding.
        assert relative_error(value, truth) < 4 * torch.finfo(input_dtype).eps + 4 * torch.finfo(tensor.dtype).eps, name
    assert relative_error(computed[0], expected[0]) < torch.finfo(input_dtype).eps


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Computes in autocast's dtype from fp32 tensors, and gradients come back in fp32; fp64 is left alone."""
    problem = gaussian(16, 24, 20, 4, 4, device=device)
    leaf = problem.requiring_grad()
    with torch.autocast(device.type, dtype=dtype):
        out = dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias, backend=backend)
        with settings(strategy="auto"):  # no fused kernel accumulates in two dtypes
            double = dual_lora_linear(leaf.x.double(), leaf.weight, *leaf.factors, leaf.bias, backend=backend)
    assert double.dtype == torch.float64
    low = problem.requiring_grad()
    expected = dual_lora_linear(low.x.to(dtype), low.weight, *low.factors, low.bias, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out, leaf.differentiable, problem.grad.to(dtype))
    truths = torch.autograd.grad(expected, low.differentiable, problem.grad.to(dtype))
    for grad, truth in zip(grads, truths, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, truth)


def test_without_weight_is_the_updates_contribution(device: torch.device, backend: str) -> None:
    problem = gaussian(9, 20, 30, 4, 4, dtype=torch.float64, device=device)
    x = problem.x.clone().requires_grad_()
    out = dual_lora_linear(x, None, *problem.factors, backend=backend)
    delta = dual_lora_delta(*problem.factors)
    torch.testing.assert_close(out, problem.x @ delta.t(), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(out, x, problem.grad)
    torch.testing.assert_close(grad, problem.grad @ delta, rtol=1e-12, atol=1e-12)


def test_reentrant_use_in_one_graph(device: torch.device) -> None:
    """A layer called twice accumulates both calls' gradients."""
    problem = gaussian(6, 8, 8, 2, 2, dtype=torch.float64, device=device).requiring_grad()
    ours = dual_lora_linear(problem.x, problem.weight, *problem.factors)
    ours = dual_lora_linear(ours, problem.weight, *problem.factors)
    theirs = reference.linear(problem.x, problem.weight, *problem.factors)
    theirs = reference.linear(theirs, problem.weight, *problem.factors)
    wanted = problem.differentiable[:-1]
    computed, expected = (torch.autograd.grad(out.sum(), wanted) for out in (ours, theirs))
    for grad, truth in zip(computed, expected, strict=True):
        assert relative_error(grad, truth) < 1e-12
