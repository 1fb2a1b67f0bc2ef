"""W0 in quantised formats: the numbers of any block, and every pass against the tensor that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.layers.memory import peak_temporary_bytes
from dual_lora_kernels import dual_lora_linear, dual_lora_merge_, dual_lora_merged, reference, settings, strategy
from dual_lora_kernels.backends import _BACKENDS, Block, Settings, resolve_backend
from dual_lora_kernels.quantised.weight import _CHUNK, QuantisedWeight
from dual_lora_kernels.self_check.problems import Problem, autograd_gradients, exact, gaussian, naive_gradients

from .accuracy import ErrorRatios
from .conftest import IS_INTERPRETED
from .quantised_weights import DTYPES, FourBits, Integers, drawn
from .test_memory import vendor_scratch

KINDS = [
    FourBits(96, 128, 64, False, torch.bfloat16),
    FourBits(70, 130, 64, True, torch.bfloat16),  # blocks cross the rows' ends
    FourBits(33, 75, 32, True, torch.float32),  # rows begin in the middle of a byte
    FourBits(64, 64, 128, False, torch.float16),  # a block is two rows
    Integers(50, 96, 96, False, torch.float32),
    Integers(50, 96, 32, True, torch.bfloat16),
]


@given(drawn(), st.data())
def test_any_block_has_the_numbers_of_the_whole(
    weight: tuple[QuantisedWeight, torch.Tensor], data: st.DataObject
) -> None:
    quantised, numbers = weight
    n, k = numbers.shape
    assert (quantised.shape, quantised.dtype) == (numbers.shape, numbers.dtype)
    assert torch.equal(quantised.dequantised(), numbers)
    top, left = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    bottom, right = data.draw(st.integers(top + 1, n)), data.draw(st.integers(left + 1, k))
    block = quantised.rows(top, bottom).columns(left, right)
    out = torch.full((right - left, bottom - top), torch.nan).t()
    block.load(out)
    assert torch.equal(out, numbers[top:bottom, left:right].float())
    restored = QuantisedWeight.restored(block.tensors, block.encoded_layout)
    assert type(restored) is type(block)
    assert restored.layout == block.layout


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rounding", ["dither", "nearest"])
def test_blocks_of_w_are_bit_for_bit_dequantise_then_add(
    device: torch.device, backend: str, kind: FourBits | Integers, rounding: str
) -> None:
    """In every compute dtype, over any block: W = round(W0 + ΔW) with the sum in fp32."""
    quantised, numbers = kind.draw(device)
    n, k = numbers.shape
    factors = exact(1, n, k, 5, 3, device=device).factors
    for dtype in (*DTYPES, torch.float64):
        chosen = resolve_backend(backend, device, dtype, torch.float32)
        whole = reference.effective_weight(numbers, *factors, dtype, rounding)
        for rows, columns in (((0, n), (0, k)), ((16, n), (0, k)), ((0, n), (32, k)), ((7, 29), (10, 41))):
            block = Block(quantised, factors, rounding, dtype).rows(*rows).columns(*columns)
            out = torch.empty(block.shape, dtype=dtype, device=device)
            chosen.effective_weight(out, block, Settings("auto", 64 * 1024))
            assert torch.equal(out, whole[slice(*rows), slice(*columns)])


@contextmanager
def _panels_where_loaded(quantised: QuantisedWeight, backend: str) -> Iterator[None]:
    """Fused kernels read W0 where it lies; formats that they do not read run over panels."""
    fused = strategy() == "fused" and not _BACKENDS[backend].reads(quantised)
    with settings(strategy="panels") if fused else nullcontext():
        yield


def _problem(
    kind: FourBits | Integers, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Problem, QuantisedWeight]:
    """A problem whose weight is what the quantised one stands for."""
    quantised, numbers = kind.draw(device)
    problem = gaussian(tokens, *numbers.shape, 4, 3, dtype=dtype, device=device)
    return dataclasses.replace(problem, weight=numbers), quantised


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_gradients_against_fp64(
    device: torch.device, backend: str, kind: FourBits | Integers, tokens: int, error_ratios: ErrorRatios,
    small_workspace: int,
) -> None:  # fmt: skip
    """Their error is that of the naive implementation on the dequantised weight, over several panels."""
    dtype = torch.bfloat16 if kind.dtype == torch.bfloat16 else torch.float32
    problem, quantised = _problem(kind, tokens, device, dtype)
    same = problem.to(dtype)
    truth = autograd_gradients(problem.to(torch.float64), rounding="nearest")
    naive = naive_gradients(same)
    leaf = problem.requiring_grad()
    wanted = (leaf.x, leaf.A, leaf.B, leaf.C, leaf.D, leaf.bias)
    with _panels_where_loaded(quantised, backend):
        out = dual_lora_linear(leaf.x, quantised, *leaf.factors, leaf.bias, backend=backend)
        ours = [out, *torch.autograd.grad(out, wanted, leaf.grad)]
    names = ("output", "input", "A", "B", "C", "D", "bias")
    for name, own, index in zip(names, ours, (0, 1, 3, 4, 5, 6, 7), strict=True):
        error_ratios.add(name, own.detach(), naive[index], truth[index])
    error_ratios.check()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merged_weights_are_those_of_the_forward_pass(
    device: torch.device, backend: str, kind: FourBits | Integers, dtype: torch.dtype
) -> None:
    """A pass over an identity gives W back: each output is one product with 1 and sums of zeros."""
    problem, quantised = _problem(kind, 1, device, dtype)
    k = problem.weight.shape[1]
    merged = dual_lora_merged(quantised, *problem.factors, dtype=dtype, backend=backend)
    identity = torch.eye(k, dtype=dtype, device=device)
    with _panels_where_loaded(quantised, backend):
        used = dual_lora_linear(identity, quantised, *problem.factors, backend=backend)
    assert torch.equal(merged, used.t())
    if quantised.dtype == dtype:
        dense = dual_lora_merge_(problem.weight.clone(), *problem.factors, backend=backend)
        assert torch.equal(merged, dense)


def test_a_merged_weight_that_overflows_is_refused(device: torch.device, backend: str) -> None:
    quantised, _ = FourBits(40, 64, 64, True, torch.float16).draw(device)
    factors = gaussian(1, 40, 64, 3, 2, device=device).factors
    with pytest.raises(ValueError, match=r"^weight: got .* which the update makes overflow torch\.float16"):
        dual_lora_merged(quantised, *factors._replace(scale=torch.tensor(1e6, device=device)), backend=backend)
    factors.A[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^A: got nan"):
        dual_lora_merged(quantised, *factors, backend=backend)


def test_bad_calls_are_named(device: torch.device) -> None:
    problem, quantised = _problem(KINDS[0], 2, device, torch.float32)
    with pytest.raises(ValueError, match=r"^weight: got shape \(50, 128\), expected \[out_features, in_features\]"):
        dual_lora_linear(problem.x, quantised.rows(0, 50), *problem.factors)
    with pytest.raises(TypeError, match=r"^dtype: got torch\.int8"):
        dual_lora_merged(quantised, *problem.factors, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^weight\.device: got cpu, expected meta"):
        dual_lora_linear(problem.x.to("meta"), quantised, *problem.to("meta").factors)


WORKSPACE = 1 << (16 if IS_INTERPRETED else 22)
LOADING = 40 * _CHUNK
"""Bytes of temporaries while a piece is dequantised, besides the workspace."""
LARGE = (384, 512, 4) if IS_INTERPRETED else (3072, 4096, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        FourBits(*LARGE[:2], 64, False, torch.bfloat16),
        FourBits(*LARGE[:2], 64, True, torch.bfloat16),
        FourBits(LARGE[0], LARGE[1] + 1, 64, True, torch.bfloat16),  # rows begin in the middle of a byte
        FourBits(*LARGE[:2], 4096, False, torch.float32),
        Integers(*LARGE[:2], LARGE[1], False, torch.float32),
        Integers(*LARGE[:2], 32, True, torch.bfloat16),
    ][: 2 if IS_INTERPRETED else None],  # its weights are as small as the pieces in which others are loaded
    ids=str,
)
def test_no_pass_dequantises_the_whole_weight(
    device: torch.device, backend: str, dtype: torch.dtype, kind: FourBits | Integers
) -> None:
    """Every allocation of a step stays under the workspace, as on a dense base, and far below W0's size."""
    rows, columns, rank = kind.n, kind.k, LARGE[2]
    rank = 4 if strategy() == "fused" else rank
    quantised, _ = kind.draw(device)
    problem = gaussian(16, rows, columns, rank, rank, dtype=dtype, device=device).requiring_grad()

    def step() -> list[torch.Tensor]:
        out = dual_lora_linear(problem.x, quantised, *problem.factors, backend=backend)
        return [out, *torch.autograd.grad(out, (problem.x, *problem.factors[:4]), problem.grad)]

    with settings(workspace_bytes=WORKSPACE), _panels_where_loaded(quantised, backend):
        step()
        trace = peak_temporary_bytes(step, device)
    assert rows * columns * dtype.itemsize >= 6 * WORKSPACE
    scratch = vendor_scratch(dataclasses.replace(problem, weight=problem.weight.detach()))
    loading = 0 if _BACKENDS[backend].reads(quantised) else LOADING
    thin = (16 * rank * dtype.itemsize + 32 + 16 * 8) * (rows + columns)  # factors' gradients, hashes, tokens
    assert trace.peak_temporary <= WORKSPACE + thin + scratch + loading
    assert trace.largest <= max(WORKSPACE, scratch)


def test_one_compilation_serves_several_shapes() -> None:
    """The second makes sizes symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda leaf, weight: dual_lora_linear(leaf.x, weight, *leaf.factors), fullgraph=True, backend="aot_eager"
    )
    for n in (64, 96, 100):
        problem, quantised = _problem(
            FourBits(n, 128, 64, True, torch.bfloat16), 9, torch.device("cpu"), torch.bfloat16
        )
        expected = dual_lora_linear(problem.x, quantised, *problem.factors)
        assert torch.equal(compiled(problem, quantised), expected)


def test_tensors_that_do_not_fit_the_layout_are_named() -> None:
    weight, _ = FourBits(40, 64, 64, True, torch.bfloat16).draw()
    packed, table, absmax, *nested = weight.tensors
    for tensors, message in (
        ((packed[1:], table, absmax, *nested), r"^packed: got 1279 elements .*expected 1280 or more, contiguous"),
        ((packed, table, absmax[1:], *nested), "^absmax: got 39 elements"),
        ((packed, table, absmax.repeat(2)[::2], *nested), r"^absmax: got 40 elements with strides \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            type(weight)(tensors, weight.layout)
    integers, _ = Integers(40, 64, 32, True, torch.bfloat16).draw()
    with pytest.raises(ValueError, match=r"^scale: got shape \(40, 1\), expected at least \(40, 2\)"):
        type(integers)((integers.tensors[0], integers.tensors[1][:, :1]), integers.layout)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[4:5], ids=str)
def test_compiled_equals_eager(compiler: str, kind: FourBits | Integers) -> None:
    torch._dynamo.reset()
    problem, quantised = _problem(kind, 9, torch.device("cpu"), torch.bfloat16)

    def call(leaf: Problem) -> torch.Tensor:
        return dual_lora_linear(leaf.x, quantised, *leaf.factors)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        leaf = problem.requiring_grad()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out, (leaf.x, *leaf.factors[:4]), leaf.grad)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


def test_opcheck(device: torch.device) -> None:
    from dual_lora_kernels.ops import parts

    problem, quantised = _problem(KINDS[1], 9, device, torch.float32)
    operators, options = torch.ops.dual_lora_kernels, ("dither", 0, 0, "auto", "auto", 1 << 20)
    factors = tuple(problem.factors)
    torch.library.opcheck(operators.linear.default, (problem.x, *parts(quantised), factors, None, *options))
    wanted = [True, True, False, True, True, False]
    arguments = (problem.grad, problem.x, *parts(quantised), factors, wanted, "clip", 1.0, None, *options)
    torch.library.opcheck(operators.gradients.default, arguments)
