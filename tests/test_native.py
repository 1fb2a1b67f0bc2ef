"""The native kernels, on the instruction set that runs: exact numbers in any shape, special values, the same bits.

tests/test_native_operators.py runs this file again on the processor's other instruction sets.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import dual_lora_linear, panels, reference
from dual_lora_kernels.backends import Block, Estimator, Factors, ParameterGradients, Settings, base_of
from dual_lora_kernels.backends.native import NativeBackend
from dual_lora_kernels.self_check.problems import Problem, exact, gaussian
from dual_lora_kernels.validation import STRAIGHT_THROUGH_ESTIMATORS

from .bits import bits
from .native_cases import DTYPES, LAYOUTS, SIZES, Case, cases, check, examples, gradient_cases, numbers, place

NATIVE = NativeBackend()
ROOM = Settings("auto", 1 << 24)
SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0]
names = st.sampled_from(["dither", "nearest"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _weight(problem: Problem, dtype: torch.dtype, rounding: str = "dither") -> torch.Tensor:
    out = torch.empty_like(problem.weight, dtype=dtype)
    NATIVE.effective_weight(out, _block(problem, dtype, rounding), ROOM)
    return out


def _block(problem: Problem, dtype: torch.dtype, rounding: str = "dither") -> Block:
    return problem.block(rounding)._replace(dtype=dtype)


def _gradients(
    problem: Problem, h: torch.Tensor, ste: str = "clip", settings: Settings = ROOM, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The four gradients from H; with `out`, W goes there in the same sweep."""
    gradients = tuple(torch.zeros_like(factor, dtype=h.dtype) for factor in problem.factors[:4])
    options = (Estimator(ste, 1.0), ParameterGradients(*gradients), settings)
    if out is None:
        NATIVE.factor_gradients(h, problem.block(), *options)
    else:
        NATIVE.weight_and_factor_gradients(out, h, _block(problem, out.dtype), *options)
    return gradients


def _few_tokens(
    x: torch.Tensor, weight: torch.Tensor | None, factors: Factors, bias: torch.Tensor | None, rounding: str
) -> torch.Tensor:
    block = Block(base_of(weight), factors, rounding, x.dtype)
    return NATIVE.fused.weight_product("forward", x, block, bias, ROOM)


# ---- exact numbers


@examples(100)
@given(case=cases())
def test_exact_weights(case: Case) -> None:
    """W has the reference's bits, and nothing around it changes."""
    expected, out = case.expected, case.out()
    before = out._base.clone()
    NATIVE.effective_weight(out, case.block, ROOM)
    check(out, before, expected)


@examples(100)
@given(data=st.data(), case=cases())
def test_exact_gradients(data: st.DataObject, case: Case) -> None:
    """The gradients that are wanted, added to what they hold; with W or without it, and W in H's place."""
    gradients = data.draw(gradient_cases(case.factors))
    places = ["nowhere", "beside H", *(["in H"] if case.stored == gradients.h.dtype else [])]
    target = data.draw(st.sampled_from(places))
    expected_weight, expected = case.expected, gradients.expected(case.factors)
    h = gradients.h
    out = {"nowhere": None, "beside H": case.out(), "in H": h}[target]
    written = [out, *gradients.gradients[:4]]
    before = [None if tensor is None else tensor._base.clone() for tensor in written]
    options = (case.block, gradients.estimator, gradients.gradients, Settings("auto", gradients.workspace))
    if out is None:
        NATIVE.factor_gradients(h, *options)
    else:
        NATIVE.weight_and_factor_gradients(out, h, *options)
    for tensor, old, truth in zip(written, before, [expected_weight, *expected], strict=True):
        if tensor is not None:
            check(tensor, old, truth)


@examples(80)
@given(data=st.data(), case=cases(), tokens=st.integers(0, 20))
def test_exact_few_tokens(data: st.DataObject, case: Case, tokens: int) -> None:
    """Y = X Wᵀ + b from the W that `effective_weight` writes, rounded once."""
    wide = case.factors.A.dtype == torch.float64
    dtype = torch.float64 if wide else data.draw(st.sampled_from(DTYPES[:3]))
    n, k = case.factors.B.shape[0], case.factors.A.shape[1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randint(-3, 4, (tokens, k), generator=generator).to(dtype)
    x = place(x, data.draw(st.sampled_from([*LAYOUTS, "expanded"])))
    bias = torch.randint(-3, 4, (2 * n,), generator=generator).to(data.draw(st.sampled_from(DTYPES)))[::2]
    bias = data.draw(st.sampled_from([bias, None]))
    weight = reference.effective_weight(case.weight, *case.factors, dtype, case.rounding, case.row0, case.col0)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    out = place(torch.full((tokens, n), torch.nan, dtype=dtype), case.out_layout)
    before = out._base.clone()
    dithers = case.rounding == "dither" and dtype in (torch.bfloat16, torch.float16)
    torch.ops.dual_lora_kernels.cpu_few_tokens(
        out,
        x,
        [] if case.weight is None else [case.weight],
        [],
        case.factors,
        bias,
        (case.row0, case.col0) if dithers else None,
    )
    check(out, before, expected.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (1030, 1024)), (torch.float32, (16, 70005)), *((dtype, (1024, 1040)) for dtype in DTYPES)],
    ids=str,
)
def test_large_outputs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """From a million elements on, W is written past the caches, but not over W0."""
    problem = exact(1, *shape, 3, 5, dtype=dtype)
    expected = reference.effective_weight(problem.weight, *problem.factors, dtype, "dither")
    assert torch.equal(bits(_weight(problem, dtype)), bits(expected))
    NATIVE.effective_weight(problem.weight, problem.block(), ROOM)
    assert torch.equal(bits(problem.weight), bits(expected))


@pytest.mark.parametrize(
    ("n", "k", "r1", "r2"), [(0, 5, 2, 2), (5, 0, 2, 2), (0, 0, 1, 1), (20, 30, 0, 0), (5, 7, 0, 3)]
)
def test_empty_shapes(n: int, k: int, r1: int, r2: int) -> None:
    """Nothing to write, or no factor: W0 as it is, no gradient."""
    problem = exact(3, n, k, r1, r2)
    assert torch.equal(_weight(problem, torch.float32), problem.weight)
    out, h = torch.empty_like(problem.weight), torch.ones(n, k)
    for settings in (Settings("auto", 0), ROOM):
        assert all(gradient.eq(0).all() for gradient in _gradients(problem, h, settings=settings, out=out)[:2])
    assert torch.equal(out, problem.weight)
    product = _few_tokens(problem.x, problem.weight, problem.factors, problem.bias, "dither")
    assert torch.equal(product, problem.x @ problem.weight.t() + problem.bias)


# ---- special values


@examples(100)
@given(
    n=SIZES,
    k=SIZES,
    scale=st.sampled_from([0.7, 1e-9, 2.0**-20, 30000.0, 1e30, 0.0]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    rounding=names,
    seed=st.integers(0, 1000),
)
def test_any_bits_in_the_weight(
    n: int, k: int, scale: float, dtypes: tuple[torch.dtype, torch.dtype], rounding: str, seed: int
) -> None:
    """W0 of every bit pattern (NaN, infinities, subnormals, overflow) and any scale: W is one addition, so exact."""
    problem = exact(1, n, k, 4, 3, seed=seed)
    problem.scale.fill_(scale)
    size = 8 * dtypes[0].itemsize
    generator = torch.Generator().manual_seed(seed)
    integers = {16: torch.int16, 32: torch.int32, 64: torch.int64}[size]
    patterns = torch.randint(-(2 ** (size - 1)), 2 ** (size - 1) - 1, (n, k), generator=generator, dtype=integers)
    weight = patterns.view(dtypes[0])
    expected = reference.effective_weight(weight, *problem.factors, dtypes[1], rounding)
    out = torch.empty(n, k, dtype=dtypes[1])
    NATIVE.effective_weight(out, Block(base_of(weight), problem.factors, rounding, out.dtype), ROOM)
    assert torch.equal(numbers(out), numbers(expected))


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_no_update_keeps_every_weight(dtype: torch.dtype) -> None:
    """All 65 536 patterns survive the dither where ΔW = 0, but for a negative zero and a NaN's payload."""
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(256, 256).view(dtype)
    problem = exact(1, 256, 256, 2, 2)
    problem.B.fill_(-1.0), problem.A.fill_(1.0)
    out = torch.empty_like(weight)
    NATIVE.effective_weight(out, Block(base_of(weight), problem.factors, "dither", dtype, 7, 2**40), ROOM)
    assert torch.equal(numbers(out), numbers(weight))


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("name", ["A", "B", "C", "D", "h"])
@pytest.mark.parametrize("ste", STRAIGHT_THROUGH_ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values_in_factors_and_h(value: float, name: str, ste: str, dtype: torch.dtype) -> None:
    """NaN and infinities reach the same entries of W and of the gradients as in the reference."""
    for factor_dtype in {torch.float32, dtype}:
        problem = exact(1, 37, 83, 5, 3).to(factor_dtype)
        h = torch.randint(1, 4, (37, 83), generator=torch.Generator().manual_seed(1)).to(dtype)
        for factor in problem.factors[:4]:
            factor[factor == 0] = 1  # no 0 · ∞ of the problem's own: the blocks' padding must make none either
        target = h if name == "h" else getattr(problem, name)
        target[2, 1] = value
        expected_weight = reference.effective_weight(problem.weight, *problem.factors, torch.float32, "nearest")
        expected = reference_gradients(problem, h, ste)
        out = torch.empty(37, 83)
        computed = _gradients(problem, h, ste, out=out)
        assert torch.equal(numbers(out), numbers(expected_weight))
        for index, (ours, theirs) in enumerate(zip(computed, expected, strict=True)):
            assert torch.equal(numbers(ours), numbers(theirs)), "ABCD"[index]


def reference_gradients(problem: Problem, h: torch.Tensor, ste: str) -> list[torch.Tensor]:
    A, B, C, D, scale = problem.factors
    p, q = reference.rank_product(B, A), reference.rank_product(D, C)
    grad_p, grad_q = reference.product_gradients(h, p, q, scale, ste, 1.0)
    wide = h.dtype
    return [
        B.t().to(wide) @ grad_p,
        grad_p @ A.t().to(wide),
        D.t().to(wide) @ grad_q,
        grad_q @ C.t().to(wide),
    ]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("name", ["x", "weight", "A", "B", "C", "D", "bias"])
def test_special_values_in_few_tokens(value: float, name: str) -> None:
    for tokens in (1, 3, 8):
        problem = exact(tokens, 37, 83, 5, 3)
        target = getattr(problem, name)
        target.view(-1)[0 if name == "x" else 5] = value
        weight = reference.effective_weight(problem.weight, *problem.factors, torch.float32, "nearest")
        expected = problem.x @ weight.t() + problem.bias
        computed = _few_tokens(problem.x, problem.weight, problem.factors, problem.bias, "nearest")
        assert torch.equal(numbers(computed), numbers(expected))


def test_a_wide_scale_multiplies_a_wide_h() -> None:
    """The update is fp32 for fp32 factors, but s·H of an fp64 H has fp64's bits."""
    problem = replace(exact(1, 40, 50, 4, 4), scale=torch.tensor(0.1, dtype=torch.float64))
    h = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = reference_gradients(problem, h, "dorefa")
    for ours, theirs in zip(_gradients(problem, h, "dorefa"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)  # sums of fp64; fp32's 0.1 is off by 1e-8


# ---- the same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(threads: None, dtype: torch.dtype) -> None:
    """Many units, few units, and several sections of partial sums."""
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for n, k, r1, r2, workspace in ((500, 1300, 16, 24, 1 << 24), (90, 70, 3, 2, 1 << 24), (300, 900, 16, 16, 1 << 18)):
        problem = gaussian(5, n, k, r1, r2, dtype=dtype, factor_dtype=factor_dtype)
        h = problem.grad.t().to(factor_dtype) @ problem.x.to(factor_dtype)
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            out = torch.empty(n, k, dtype=dtype)
            gradients = _gradients(problem, h.clone(), settings=Settings("auto", workspace), out=out)
            tokens = _few_tokens(problem.x, problem.weight, problem.factors, problem.bias, "dither")
            results.append([_weight(problem, dtype), out, *gradients, tokens])
        for other in results[1:]:
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(20)
@given(data=st.data(), n=st.integers(1, 500), k=st.integers(1, 900), ranks=st.sampled_from([(16, 16), (5, 300)]))
def test_every_kernel_and_block_has_one_weight(
    dtype: torch.dtype, data: st.DataObject, n: int, k: int, ranks: tuple[int, int]
) -> None:
    """Gaussian factors: a block by itself, the gradients' W and the few tokens' W are bits of the whole."""
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    problem = gaussian(1, n, k, *ranks, dtype=dtype, factor_dtype=factor_dtype)
    whole = bits(_weight(problem, dtype))
    (row, stop), (col, last) = (
        sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for size in (n, k)
    )
    part = torch.empty(stop - row, last - col, dtype=dtype)
    NATIVE.effective_weight(part, problem.block().rows(row, stop).columns(col, last), ROOM)
    assert torch.equal(bits(part), whole[row:stop, col:last])
    for wide in {factor_dtype, torch.float64}:
        out, h = torch.empty(n, k, dtype=dtype), torch.ones(n, k, dtype=wide)
        _gradients(problem, h, out=out)
        assert torch.equal(bits(out), whole)
    picked = torch.arange(data.draw(st.integers(0, k - 1)), k)[:6]
    x = torch.zeros(len(picked), k, dtype=dtype).index_put_(
        (torch.arange(len(picked)), picked), torch.ones((), dtype=dtype)
    )
    product = _few_tokens(x, problem.weight, problem.factors, None, "dither")
    assert torch.equal(product, whole.view(dtype)[:, picked].t())


def test_without_an_input_gradient_the_native_backend_uses_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They once ran on a thread of the eager backend's, which has one thread for products."""
    called: list[threading.Thread] = []
    passes = panels.parameter_gradients

    def recorded(*args: Any) -> None:
        called.append(threading.current_thread())
        passes(*args)

    monkeypatch.setattr(panels, "parameter_gradients", recorded)
    problem = gaussian(7, 600, 700, 4, 3).requiring_grad()
    out = dual_lora_linear(problem.x.detach(), problem.weight.detach(), *problem.factors, backend="native")
    out.backward(problem.grad)
    assert called == [threading.main_thread()]
