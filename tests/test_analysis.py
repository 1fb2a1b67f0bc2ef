"""Figures of an update, block by block on every backend, against the plain formula on whole matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import analysis, dual_lora_delta, reference, settings
from dual_lora_kernels.analysis import Figures
from dual_lora_kernels.backends import Block, Factors, base_of
from dual_lora_kernels.quantised.weight import QuantisedWeight
from dual_lora_kernels.self_check.problems import Problem, exact, gaussian

from .conftest import IS_INTERPRETED
from .quantised_weights import drawn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [2.0**-4, -(2.0**-4), 0.0, 2.0**-9, 2.0**-22]
"""The last ones make updates that rounding deletes in the narrow dtypes, and in fp32."""


def spelled_out(problem: Problem, dtype: torch.dtype) -> dict[str, object]:
    """The figures that are counts or exact, from whole matrices."""
    p, q = reference.rank_product(problem.B, problem.A), reference.rank_product(problem.D, problem.C)
    update = reference.delta(p, q, problem.scale)
    merged = reference.round_to(problem.weight.float() + update, dtype, "nearest")
    return {
        "entries": p.numel(),
        "active": int((p > 0).sum()),
        "negative": int((q <= 0).sum()),
        "changed": int((update != 0).sum()),
        "rounded": int(((update != 0) & (merged == problem.weight)).sum()),
        "largest": float(update.abs().max()),
        "counts": exponent_counts(update),
    }


def exponent_counts(update: torch.Tensor) -> dict[int, int]:
    """How many |ΔW| have each exponent, subnormal ones at −127."""
    counts: dict[int, int] = {}
    for value in update.abs().flatten().tolist():
        if value:
            exponent = max(-127, math.frexp(value)[1] - 1)
            counts[exponent] = counts.get(exponent, 0) + 1
    return counts


def measured(found: Figures) -> dict[str, object]:
    """The same, as measured."""
    magnitudes = found.magnitudes
    exponents = range(magnitudes.first_exponent, magnitudes.first_exponent + len(magnitudes.counts))
    return {
        "entries": found.entries,
        "active": found.active,
        "negative": found.negative,
        "changed": found.changed,
        "rounded": round(found.rounded_away * found.changed),
        "largest": found.largest,
        "counts": {e: count for e, count in zip(exponents, magnitudes.counts, strict=True) if count},
    }


def figures(problem: Problem, backend: str, others: dict[str, Factors] | None = None) -> Figures:
    with settings(backend=backend):
        block = analysis.block(problem.factors, base_of(problem.weight))
        return analysis.figures(analysis.row_panels(block), others)


def scaled(problem: Problem, scale: float) -> Problem:
    problem.scale.fill_(scale)
    return problem


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    n=st.integers(1, 40), k=st.integers(1, 40), r1=st.integers(1, 5), r2=st.integers(1, 5),
    scale=st.sampled_from(SCALES), seed=st.integers(0, 100),
)  # fmt: skip
def test_counts_are_the_formulas(
    backend: str, dtype: torch.dtype, n: int, k: int, r1: int, r2: int, scale: float, seed: int
) -> None:
    """Exactly, since exact arithmetic leaves backends no choice; panels are of one to a few rows."""
    problem = scaled(exact(1, n, k, r1, r2, dtype=dtype, seed=seed), scale)
    assert measured(figures(problem, backend)) == spelled_out(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_sums_in_fp64(backend: str, dtype: torch.dtype) -> None:
    problem = exact(1, 300, 200, 4, 3, dtype=dtype)
    found = figures(problem, backend)
    update = reference.effective_weight(None, *problem.factors, torch.float32, "nearest").double()
    base = problem.weight.double()
    assert found.norm == pytest.approx(float(update.norm()), rel=1e-12)  # fp64's rounding of sums
    assert found.relative_norm == pytest.approx(float(update.norm() / base.norm()), rel=1e-12)
    assert found.magnitudes.rms == pytest.approx(float(update.square().mean().sqrt()), rel=1e-12)


def test_the_update_has_the_bits_of_training(backend: str) -> None:
    """Of numbers that round: the norm is that of what the backend computes as ΔW, in blocks of any shape."""
    problem = gaussian(1, 130, 90, 5, 4)
    with settings(backend=backend):
        whole = dual_lora_delta(*problem.factors)
        for scale in (0.7, -1.3):
            problem.scale.fill_(scale)
            update, sizes, signs = analysis._parts(analysis.block(problem.factors).rows(7, 101).columns(3, 80))
            part = dual_lora_delta(*problem.factors)[7:101, 3:80]
            assert torch.equal(update, part)
            assert torch.equal(sizes > 0, whole[7:101, 3:80] != 0)
            assert torch.equal(signs, torch.where(sizes > 0, part.sign() * math.copysign(1, scale), signs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_away_is_what_merging_by_nearest_leaves(backend: str, dtype: torch.dtype) -> None:
    """Powers of two (whose lower neighbour is nearer), ties, zero and subnormal numbers, each with every update."""
    info = torch.finfo(dtype)
    w0 = [0.0, 1.0, -1.0, 1.0 + info.eps, 1.0 - info.eps / 2, 3.0, info.tiny]
    if not IS_INTERPRETED:  # Triton's interpreter reads subnormal bf16 numbers as zeros
        w0 += [info.tiny * info.eps, -info.tiny / 2]
    steps = [1.0, 0.5, 0.25, 0.75]
    updates = [sign * size * info.eps * step for sign in (1, -1) for size in (1.0, info.tiny) for step in steps]
    weight = torch.tensor([w0] * len(updates)).to(dtype)
    sizes = torch.tensor(updates)[:, None]
    # One rank each, so that P is |ΔW| and Q its sign.
    ones = torch.ones(1, len(w0))
    factors = Factors(ones, sizes.abs(), ones, sizes.sign(), torch.tensor(1.0))
    with settings(backend=backend):
        found = analysis.figures([analysis.block(factors, base_of(weight))])
    exact_sums = weight.double() + sizes.double()
    expected = (exact_sums.to(dtype) == weight) & (sizes != 0)
    assert found.changed == int((sizes != 0).sum()) * len(w0)
    assert 0 < int(expected.sum()) < expected.numel()
    assert round(found.rounded_away * found.changed) == int(expected.sum())


@given(drawn(), st.sampled_from(SCALES), st.integers(0, 100))
def test_a_quantised_base_counts_by_its_numbers(
    backend: str, base: tuple[QuantisedWeight, torch.Tensor], scale: float, seed: int
) -> None:
    weight, numbers = base
    problem = scaled(exact(1, *numbers.shape, 3, 2, seed=seed), scale)
    with settings(backend=backend):
        found = analysis.figures(analysis.row_panels(analysis.block(problem.factors, base_of(weight))))
    assert measured(found) == spelled_out(replace(problem, weight=numbers), numbers.dtype)
    assert found.base_square == pytest.approx(float(numbers.double().square().sum()), rel=1e-12)  # fp64's rounding


@pytest.mark.usefixtures("small_workspace")
@given(n=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 100))
def test_overlaps_are_the_formulas(backend: str, n: int, k: int, seed: int) -> None:
    one, other, third = (exact(1, n, k, 3, 2, seed=seed + number) for number in range(3))
    one.scale.neg_()
    found = figures(one, backend, {"other": other.factors, "third": third.factors})
    assert list(found.overlaps) == ["other", "third"]
    for name, its in (("other", other), ("third", third)):
        p, q, p_other, q_other = (
            reference.rank_product(up, down)
            for up, down in ((one.B, one.A), (one.D, one.C), (its.B, its.A), (its.D, its.C))
        )
        update = reference.delta(p, q, one.scale).double()
        another = reference.delta(p_other, q_other, its.scale).double()
        overlap = found.overlaps[name]
        assert overlap.equal_signs == int(((q > 0) == (q_other > 0)).sum())
        assert overlap.both_active == int(((p > 0) & (p_other > 0)).sum())
        norms = float(update.norm() * another.norm())
        expected = float((update * another).sum()) / norms if norms else 0.0
        assert found.cosine(name) == pytest.approx(expected, abs=1e-12)  # fp64's rounding


def test_an_update_is_most_like_itself_and_its_opposite(backend: str) -> None:
    problem = gaussian(1, 60, 50, 3, 3)
    opposite = problem.factors._replace(scale=-problem.scale)
    found = figures(problem, backend, {"same": problem.factors, "opposite": opposite})
    assert (found.cosine("same"), found.cosine("opposite")) == pytest.approx((1.0, -1.0), abs=1e-15)  # fp64's rounding
    assert found.overlaps["same"].equal_signs == found.entries
    assert found.overlaps["opposite"].both_active == found.active


def test_without_an_update_shares_are_zero(backend: str) -> None:
    """Every P is 0, so every entry is frozen; 0 / 0 is no figure."""
    problem = exact(1, 20, 30, 2, 2)
    problem.B.zero_()
    found = figures(problem, backend, {"same": problem.factors})
    assert (found.frozen, found.norm, found.relative_norm, found.rounded_away) == (1.0, 0.0, 0.0, 0.0)
    assert (found.magnitudes.counts, found.magnitudes.largest, found.cosine("same")) == ((), 0.0, 0.0)


def test_beside_a_zero_weight_an_update_is_infinite(backend: str) -> None:
    problem = exact(1, 20, 30, 2, 2)
    problem.weight.zero_()
    found = figures(problem, backend)
    assert (found.relative_norm, found.rounded_away) == (math.inf, 0.0)


def test_a_scale_that_underflows_freezes_nothing(backend: str) -> None:
    """P > 0 is what counts, not ΔW ≠ 0."""
    problem = scaled(gaussian(1, 40, 30, 3, 3), 1e-45)
    before = figures(scaled(gaussian(1, 40, 30, 3, 3), 1.0), backend)
    found = figures(problem, backend)
    assert (found.active, found.negative) == (before.active, before.negative)
    assert found.changed < found.active
    assert found.magnitudes.first_exponent == -127


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float64])
def test_factors_of_other_dtypes(backend: str, factor_dtype: torch.dtype) -> None:
    problem = exact(1, 40, 30, 3, 2, dtype=torch.bfloat16)
    other = {name: getattr(problem, name).to(factor_dtype) for name in "ABCD"}
    with settings(backend=backend):
        block = analysis.block(problem.factors._replace(**other), base_of(problem.weight))
        found = analysis.figures(analysis.row_panels(block))
    assert measured(found) == spelled_out(problem, torch.bfloat16)


@pytest.mark.parametrize(("name", "value"), [("A", math.nan), ("B", math.inf), ("A", 1e30)])
def test_what_is_not_finite_is_refused(backend: str, name: str, value: float) -> None:
    problem = gaussian(1, 40, 30, 3, 2)
    getattr(problem, name).fill_(value)
    if value == 1e30:
        problem.B.fill_(1e30)  # P overflows
    with pytest.raises(ValueError, match="the update holds NaN or infinity"):
        figures(problem, backend)


def test_a_base_weight_that_is_not_finite_is_refused(backend: str) -> None:
    problem = gaussian(1, 40, 30, 3, 2)
    problem.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="the base weight holds NaN or infinity"):
        figures(problem, backend)


def test_another_update_that_is_not_finite_is_refused_by_its_name(backend: str) -> None:
    problem, other = gaussian(1, 40, 30, 3, 2), gaussian(1, 40, 30, 3, 2)
    other.A.fill_(math.inf)
    with pytest.raises(ValueError, match="the update of elsewhere holds NaN"):
        figures(problem, backend, {"elsewhere": other.factors})


def test_blocks_are_in_order_and_within_the_workspace(small_workspace: int) -> None:
    problem = exact(1, 500, 40, 2, 2)
    blocks = list(analysis.row_panels(analysis.block(problem.factors)))
    assert [block.row0 for block in blocks] == [sum(b.shape[0] for b in blocks[:i]) for i in range(len(blocks))]
    assert max(math.prod(block.shape) for block in blocks) * analysis._BYTES_PER_ENTRY <= small_workspace


@pytest.mark.usefixtures("small_workspace")
def test_no_tensor_of_the_weights_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    original = analysis.computed

    def computed(block: Block) -> torch.Tensor:
        shapes.append(block.shape)
        return original(block)

    monkeypatch.setattr(analysis, "computed", computed)
    problem = exact(1, 300, 200, 2, 2)
    figures(problem, "auto")
    assert max(math.prod(shape) for shape in shapes) < 300 * 200 / 50
