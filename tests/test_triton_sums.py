"""Sums over programs: partial gradients into gradients, and products whose sum several programs share out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_lora_kernels.backends import ParameterGradients, Settings
from dual_lora_kernels.backends.triton import device_buffers, execute, launches
from dual_lora_kernels.backends.triton.architecture import INTERPRETED_FAMILY, Architecture
from dual_lora_kernels.self_check.problems import gaussian

from .bits import bits

pytestmark = pytest.mark.interpreter
ROOM = Settings("auto", 1 << 25)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU in the interpreter, or the GPU."""
    return torch.device(request.param)


@given(
    parts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    ranks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    wanted=st.lists(st.booleans(), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_partial_gradients_are_added_in_their_order(
    device: torch.device,
    parts: tuple[int, int],
    sizes: tuple[int, int],
    ranks: tuple[int, int],
    wanted: list[bool],
    dtype: torch.dtype,
) -> None:
    """Bit for bit the sums of one part after the other, into gradients of any strides, and only where wanted."""
    (rows, columns), (r1, r2) = sizes, ranks
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(device)

    up, down = draw(parts[0], rows, r1 + r2), draw(parts[1], columns, r1 + r2)
    sums = [torch.zeros_like(part[0]) for part in (up, down)]
    for total, each in zip(sums, (up, down), strict=True):
        for part in each:
            total += part
    # A is a slice of a larger matrix, C is transposed, B and D are contiguous.
    before = [draw(r1, columns + 3)[:, 2:-1], draw(rows, r1), draw(columns, r2).t(), draw(rows, r2)]
    given_gradients = [each.clone() if want else None for each, want in zip(before, wanted, strict=True)]
    if wanted[0]:
        storage = before[0]._base
        assert storage is not None
        given_gradients[0] = storage.clone()[:, 2:-1]
    launches.add_partials(ParameterGradients(*given_gradients), ranks, (up, down)).run()
    expected = [sums[1][:, :r1].t(), sums[0][:, :r1], sums[1][:, r1:].t(), sums[0][:, r1:]]
    for value, start, part in zip(given_gradients, before, expected, strict=True):
        assert value is None or torch.equal(bits(value.contiguous()), bits((start + part).contiguous()))


@pytest.mark.parametrize("tokens", [1, 5])
def test_split_sums_leave_the_counters_as_they_found_them(
    device: torch.device, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next call's programs count anew: the second result has the first one's bits."""
    monkeypatch.setattr(execute, "_architecture", lambda _: Architecture(INTERPRETED_FAMILY, 132))
    problem = gaussian(tokens, 70, 600, 8, 8, dtype=torch.bfloat16, device=device)
    results = [execute.weight_product("forward", problem.x, problem.block(), None, ROOM) for _ in range(2)]
    assert torch.equal(bits(results[0]), bits(results[1]))
    kept = [counters for each in device_buffers._counters.values() for counters in each]
    assert kept
    assert not any(counters.any() for counters in kept)


def test_counters_grow_and_are_not_released(device: torch.device) -> None:
    """Kernels that use the shorter ones may still be queued."""
    first = device_buffers.counters(device, 10)
    assert device_buffers.counters(device, 20) is first
    longer = device_buffers.counters(device, len(first) + 1)
    assert len(longer) > len(first)
    assert device_buffers.counters(device, 10) is longer
    assert any(first is each for kept in device_buffers._counters.values() for each in kept)


@pytest.mark.gpu
def test_streams_and_graphs_count_by_themselves() -> None:
    """Two streams' kernels may run at once, and a graph may be replayed beside the stream that it was captured on."""
    device = torch.device("cuda", torch.cuda.current_device())
    own = device_buffers.counters(device, 10)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = device_buffers.counters(device, 10)
    assert other.data_ptr() != own.data_ptr()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        captured = device_buffers.counters(device, 10)
    assert captured.data_ptr() not in (own.data_ptr(), other.data_ptr())
    assert not any(captured is each for kept in device_buffers._counters.values() for each in kept)
