"""CUDA graphs and torch.compile on a GPU: nothing in a layer's step waits for the host or belongs to another graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dual_lora_kernels import DualLoraLinear, dual_lora_linear, set_strategy
from dual_lora_kernels.backends.triton import device_buffers
from dual_lora_kernels.self_check.problems import gaussian

pytestmark = [pytest.mark.interpreter, pytest.mark.gpu]


def test_a_captured_graph_follows_the_scale() -> None:
    """Replays see a scale changed in place: warm-up inside a CUDA graph."""
    problem = gaussian(4, 256, 256, 16, 16, dtype=torch.bfloat16, device="cuda")
    for mode in ("panels", "fused"):
        set_strategy(mode)

        def call() -> torch.Tensor:
            return dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for scale in (0.1, 0.7):
            problem.scale.fill_(scale)
            graph.replay()
            assert torch.equal(out, call()), (mode, scale)


def test_a_graph_captured_before_any_call_has_its_own_dither() -> None:
    """The dither's vectors are not kept from a capture, whose memory belongs to the graph."""
    problem = gaussian(4, 256, 256, 16, 16, dtype=torch.bfloat16, device="cuda")
    set_strategy("fused")
    expected = dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")
    device_buffers._hashes.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")
    assert not any(device_buffers._hashes.values())
    graph.replay()
    assert torch.equal(out, expected)


def test_compiled_graphs_do_not_own_the_dither() -> None:
    """torch.compile's CUDA graphs run a call once in memory that they reuse: nothing kept may come from there."""
    problem = gaussian(4, 256, 256, 16, 16, dtype=torch.bfloat16, device="cuda")
    set_strategy("fused")
    expected = dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")
    device_buffers._hashes.clear()
    compiled = torch.compile(
        lambda: dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton"), mode="reduce-overhead"
    )
    for _ in range(4):
        assert torch.equal(compiled(), expected)
    assert device_buffers._hashes


@pytest.mark.parametrize("mode", ["panels", "fused"])
def test_compiled_layers_equal_eager_ones(mode: str) -> None:
    problem = gaussian(32, 256, 256, 16, 16, dtype=torch.bfloat16, device="cuda").requiring_grad()
    set_strategy(mode)

    def step() -> tuple[torch.Tensor, ...]:
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")
        return out, *torch.autograd.grad(out, problem.factors[:4], problem.grad)

    compiled = torch.compile(
        lambda: dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton"), fullgraph=True
    )
    out, *gradients = step()
    assert torch.equal(compiled(), out)
    for value, expected in zip(
        torch.autograd.grad(compiled(), problem.factors[:4], problem.grad), gradients, strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("tokens", [4, 300])
def test_a_captured_step_equals_an_eager_one(tokens: int) -> None:
    """Forward and backward in one graph: few tokens run fused with split sums, many over panels."""
    problem = gaussian(tokens, 512, 768, 16, 16, dtype=torch.bfloat16, device="cuda").requiring_grad()

    def step() -> tuple[torch.Tensor, ...]:
        out = dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")
        return out, *torch.autograd.grad(out, (problem.x, *problem.factors[:4]), problem.grad)

    expected = step()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for value in captured:
            value.zero_()
        graph.replay()
        for value, truth in zip(captured, expected, strict=True):
            assert torch.equal(value, truth)


def test_a_models_step_is_compiled_without_breaks_into_cuda_graphs() -> None:
    """torch.compile(mode="reduce-overhead") gives no reason against a graph, and the results are the eager ones."""
    torch.manual_seed(0)
    model = nn.Sequential(DualLoraLinear(256, 512), nn.SiLU(), DualLoraLinear(512, 256)).to("cuda", torch.bfloat16)
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        model(x).square().mean().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        compiled(x).square().mean().backward()
        computed = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        assert expected
        for value, truth in zip(computed, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=0.05, atol=1e-5)  # Inductor fuses SiLU in fp32
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["graph_break"]
