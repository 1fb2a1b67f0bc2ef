"""Contracts with the framework: operators, compile, export, checkpointing, inference mode, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dual_lora_kernels import DualLoraLinear, DualLoraWarmup, dual_lora_linear
from dual_lora_kernels.self_check.problems import Problem, autograd_gradients, gaussian, relative_error

OPS = torch.ops.dual_lora_kernels
OPTIONS = ("dither", 0, 0, "auto", "auto", 1 << 25)
"""Rounding, origin, backend, strategy and workspace."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _calls(problem: Problem) -> dict[str, tuple[object, ...]]:
    factors = tuple(problem.factors)
    return {
        "linear": (problem.x, [problem.weight], "", factors, problem.bias, *OPTIONS),
        "gradients": (
            problem.grad, problem.x, [problem.weight], "", factors, [True, True, False, True, True, True], "clip", 1.0,
            None, *OPTIONS,
        ),
        "merge_": (problem.weight.clone(), factors, *OPTIONS),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "gradients", "merge_"])
def test_opcheck(device: torch.device, name: str) -> None:
    problem = gaussian(9, 12, 10, 3, 4, device=device)
    torch.library.opcheck(getattr(OPS, name).default, _calls(problem)[name])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager(compiler: str, dtype: torch.dtype) -> None:
    problem = gaussian(9, 12, 10, 3, 4, dtype=dtype)

    def call(leaf: Problem) -> torch.Tensor:
        return dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, leaf.bias)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        leaf = problem.requiring_grad()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out, leaf.differentiable, leaf.grad)])
    *same, (eager_bias, compiled_bias) = zip(*results, strict=True)
    assert all(torch.equal(eager, compiled) for eager, compiled in same)
    # Inductor sums the bias gradient in its own order.
    assert relative_error(compiled_bias, eager_bias) <= torch.finfo(dtype).eps


def test_warm_up_does_not_recompile() -> None:
    model = nn.Sequential(DualLoraLinear(10, 12), nn.GELU(), DualLoraLinear(12, 4))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    warmup = DualLoraWarmup(model, steps=6)
    x = torch.randn(5, 10)
    outputs = []
    for _ in range(8):
        out = compiled(x)
        out.sum().backward()
        assert torch.equal(out, model(x))
        outputs.append(out.detach())
        warmup.step()
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[5])
    assert torch.equal(outputs[5], outputs[7])


def test_compile_under_autocast() -> None:
    layer = DualLoraLinear(10, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = compiled(x), layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_compile_with_dynamic_batch() -> None:
    layer = DualLoraLinear(10, 12)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for tokens in (5, 7, 30):
        x = torch.randn(tokens, 10)
        assert torch.equal(compiled(x), layer(x))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_export(strict: bool, frozen: bool) -> None:
    """One operator in the graph, a dynamic batch dimension, and a scale that stays a buffer."""
    layer = DualLoraLinear(10, 12).requires_grad_(not frozen)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (torch.randn(3, 10),), dynamic_shapes=({0: batch},), strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    assert [str(n.target) for g in graphs for n in g.nodes].count("dual_lora_kernels.linear.default") == 1
    x = torch.randn(7, 10)
    assert torch.equal(program.module()(x), layer(x))
    assert "scale" in dict(program.named_buffers())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(device: torch.device, reentrant: bool) -> None:
    problem = gaussian(9, 12, 10, 3, 4, device=device).requiring_grad()

    def call(x: torch.Tensor) -> torch.Tensor:
        return dual_lora_linear(x, problem.weight, *problem.factors, problem.bias)

    expected = torch.autograd.grad(call(problem.x), problem.differentiable, problem.grad)
    checkpoint(call, problem.x, use_reentrant=reentrant).backward(problem.grad)
    for leaf, truth in zip(problem.differentiable, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, truth)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(device: torch.device, mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    problem = gaussian(9, 12, 10, 3, 4, device=device).requiring_grad()
    with mode():
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, problem.bias)
    assert not out.requires_grad
    assert torch.equal(out, dual_lora_linear(problem.x, problem.weight, *problem.factors, problem.bias))


def test_changing_the_scale_between_forward_and_backward_is_an_error() -> None:
    """The backward pass would use another W than the forward pass did."""
    layer = DualLoraLinear(4, 4)
    out = layer(torch.randn(2, 4))
    layer.set_scale(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_smooth_gradients_pass_gradcheck() -> None:
    problem = gaussian(3, 5, 4, 2, 3, dtype=torch.float64).requiring_grad()
    C, D = problem.C.detach(), problem.D.detach()

    def smooth(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, A, B, bias = tensors
        return dual_lora_linear(x, weight, A, B, C, D, problem.scale, bias)

    assert torch.autograd.gradcheck(smooth, (problem.x, problem.weight, problem.A, problem.B, problem.bias))


def test_gradient_accumulation_over_micro_batches() -> None:
    """Two backward passes add up (each is clipped by itself: it is complete over its own tokens only)."""
    problem = gaussian(8, 6, 5, 2, 2, dtype=torch.float64)
    leaf = problem.requiring_grad()
    for half in (slice(0, 4), slice(4, 8)):
        dual_lora_linear(leaf.x[half], leaf.weight, *leaf.factors, ste="dorefa").backward(problem.grad[half])
    _, *truth = autograd_gradients(problem, ste="dorefa")
    for tensor, expected in zip(leaf.differentiable[:-1], truth, strict=False):
        assert tensor.grad is not None
        assert relative_error(tensor.grad, expected) < 1e-12


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda a: torch.func.jvp(f, (a,), (a,))[1]])
def test_functorch_transforms_raise_under_compile_too(transform: Callable[..., Callable[..., torch.Tensor]]) -> None:
    """They came out as zeros once: the operators are opaque to them."""
    problem = gaussian(3, 5, 4, 2, 2)

    def loss(A: torch.Tensor) -> torch.Tensor:
        return dual_lora_linear(problem.x, problem.weight, A, *problem.factors[1:]).sum()

    with pytest.raises(NotImplementedError, match="functorch transforms"):
        torch.compile(lambda a: transform(loss)(a), backend="eager")(problem.A)
