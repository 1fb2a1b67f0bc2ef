"""A shard's W has the bits of the full one's slice: in every pass, merged, and as an update alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels import dual_lora_delta, dual_lora_linear, dual_lora_merge_, dual_lora_merged, settings
from dual_lora_kernels.self_check.problems import gaussian

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(data=st.data())
def test_a_shard_has_the_slice_of_the_full_weight(backend: str, data: st.DataObject) -> None:
    """Ranges begin and end anywhere: inside the tiles, vectors and hashing blocks of every backend."""
    n, k = data.draw(st.integers(2, 150), "n"), data.draw(st.integers(2, 150), "k")
    top, left = data.draw(st.integers(0, n - 1), "top"), data.draw(st.integers(0, k - 1), "left")
    bottom, right = data.draw(st.integers(top + 1, n), "bottom"), data.draw(st.integers(left + 1, k), "right")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rounding = data.draw(st.sampled_from(["dither", "nearest"]), "rounding")
    problem = gaussian(1, n, k, 4, 3, dtype=dtype, seed=data.draw(st.integers(0, 99), "seed"))
    factors = problem.factors.rows(top, bottom).columns(left, right)
    part = problem.weight[top:bottom, left:right]
    options = {"rounding": rounding, "backend": backend}
    whole = dual_lora_merged(problem.weight, *problem.factors, **options)[top:bottom, left:right]
    here = options | {"origin": (top, left)}
    assert torch.equal(dual_lora_merged(part, *factors, **here), whole)
    assert torch.equal(dual_lora_merge_(part.clone(), *factors, **here), whole)
    rows, columns = whole.shape
    for tokens in (1, columns):  # few tokens have kernels of their own
        x = torch.eye(columns, dtype=dtype)
        read = torch.cat([dual_lora_linear(each, part, *factors, **here) for each in x.split(tokens)])
        assert torch.equal(read.t(), whole)
    x = torch.zeros(rows, columns, dtype=dtype, requires_grad=True)
    dual_lora_linear(x, part, *factors, **here).backward(torch.eye(rows, dtype=dtype))
    assert x.grad is not None
    assert torch.equal(x.grad, whole)


@given(data=st.data())
def test_the_update_of_a_shard(backend: str, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(2, 150), "n"), data.draw(st.integers(2, 150), "k")
    top, left = data.draw(st.integers(0, n - 1), "top"), data.draw(st.integers(0, k - 1), "left")
    problem = gaussian(1, n, k, 4, 3, seed=data.draw(st.integers(0, 99), "seed"))
    with settings(backend=backend):
        whole = dual_lora_delta(*problem.factors)
        part = dual_lora_delta(*problem.factors.rows(top, n).columns(left, k), origin=(top, left))
    assert torch.equal(part, whole[top:, left:])


@pytest.mark.parametrize(
    ("origin", "error", "message"),
    [
        ([0, 0], TypeError, r"origin: got \[0, 0\], expected a tuple of two integers"),
        ((0,), TypeError, r"origin: got \(0,\)"),
        ((0, 1.0), TypeError, r"origin: got \(0, 1.0\)"),
        ((0, True), TypeError, r"origin: got \(0, True\)"),
        ((-1, 0), ValueError, r"origin: got \(-1, 0\), expected a row and a column from 0"),
        ((0, 1 << 40), ValueError, "origin: got"),
    ],
)
def test_an_origin_is_checked(origin: object, error: type[Exception], message: str) -> None:
    problem = gaussian(1, 4, 6, 2, 2)
    for call in (
        lambda: dual_lora_linear(problem.x, problem.weight, *problem.factors, origin=origin),  # type: ignore[arg-type]
        lambda: dual_lora_merge_(problem.weight, *problem.factors, origin=origin),  # type: ignore[arg-type]
        lambda: dual_lora_delta(*problem.factors, origin=origin),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=message):
            call()
