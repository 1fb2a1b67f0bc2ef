"""A kernel's work and its roofline, by hand."""

from __future__ import annotations

from benchmarks.gpu import rooflines
from benchmarks.gpu.rooflines import Ceilings, Point, Reached, Work


def test_work_of_each_kernel() -> None:
    """4096², r1 = r2 = 16, counted by hand: 2²⁴ weights, 2·16·8192 numbers in the factors."""
    weights, factor_bytes, rank_operations = 2**24, 4 * 32 * 8192, 2 * 32 * 2**24
    expected = {
        ("effective_weight", 0): Work(4 * weights + factor_bytes, rank_operations),
        ("factor_gradients", 0): Work(4 * weights + 2 * factor_bytes, 3 * rank_operations),
        ("forward", 16): Work(2 * weights + 2 * 16 * 8192 + factor_bytes, 2 * 16 * weights + rank_operations),
        ("token_product", 256): Work(2 * 256 * 8192 + 2 * factor_bytes, 2 * 256 * weights + 3 * rank_operations),
    }
    assert {key: rooflines.work(Point(key[0], 4096, 4096, key[1])) for key in expected} == expected
    assert rooflines.work(Point("input_gradient", 8, 32, 3)) == rooflines.work(Point("forward", 8, 32, 3))


def test_the_larger_floor_is_the_roofline() -> None:
    assert Work(bytes=300, operations=4000).floor(Ceilings(100.0, 1000.0)) == (3.0, 4.0)
    assert Reached(8.0, 300, 4000, bytes_floor=3.0, operations_floor=4.0).fraction == 0.5
    assert Reached(8.0, 300, 4000, bytes_floor=6.0, operations_floor=4.0).fraction == 0.75
