"""Fused kernels that do not fit: which shapes odd sizes get, and what happens where a chip refuses a kernel."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dual_lora_kernels import dual_lora_linear, set_strategy
from dual_lora_kernels.backends.triton import device_buffers, execute
from dual_lora_kernels.backends.triton.arguments import Hashes
from dual_lora_kernels.backends.triton.fused_kernels import token_product_kernel, weight_product_kernel
from dual_lora_kernels.backends.triton.launch import Launch
from dual_lora_kernels.backends.triton.shapes import TABLE, ProductShape, Shapes
from dual_lora_kernels.self_check.problems import Problem, gaussian

WHOLE = ProductShape(128, 128, 64, 8, 3, whole_tiles=True)
ANY = ProductShape(64, 64, 64, 4, 3)


def _shapes(*entries: ProductShape) -> Shapes:
    return dataclasses.replace(TABLE["sm_90"], forward=entries)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((512, 256, 128), WHOLE), ((512, 256, 100), ANY), ((512, 200, 128), ANY), ((1, 128, 64), WHOLE)],
)
def test_shapes_for_whole_tiles_are_for_whole_tiles(sizes: tuple[int, int, int], expected: ProductShape) -> None:
    assert _shapes(WHOLE, ANY).weight_product("forward", *sizes) is expected


@pytest.mark.parametrize("entries", [(WHOLE,), (ANY, dataclasses.replace(ANY, up_to=64)), ()])
def test_a_table_that_leaves_sizes_out_is_refused(entries: tuple[ProductShape, ...]) -> None:
    with pytest.raises((ValueError, IndexError)):
        _shapes(*entries)


@pytest.mark.parametrize("family", TABLE)
@pytest.mark.parametrize("operation", ["forward", "input_gradient"])
def test_every_size_has_a_shape(family: str, operation: str) -> None:
    for tokens in (1, 16, 17, 64, 65, 128, 129, 100_000):
        for features in (1, 63, 4096, 4099):
            shape = TABLE[family].weight_product(operation, tokens, features, features)
            assert shape.suits(tokens, features, features)


def test_an_exception_while_the_dithers_vectors_are_made_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would read past the end of shorter vectors. On a GPU they are made in a thread of their own."""

    def no_memory(length: int, device: torch.device) -> Hashes:
        raise torch.OutOfMemoryError("none left")

    like = torch.empty(2, 2, dtype=torch.bfloat16)
    monkeypatch.setattr(device_buffers, "_hashes", {})
    monkeypatch.setattr(device_buffers, "_make_hashes", no_memory)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda _: torch.device("cuda", 0)), raising=False)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        device_buffers.hashes(like, "dither", 4, 4)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A chip that refuses every fused kernel; returns the refused ones."""
    refused: list[Any] = []
    run = Launch.run

    def maybe(launch: Launch) -> None:
        if launch.kernel in (weight_product_kernel, token_product_kernel):
            refused.append(launch.kernel)
            raise OutOfResources(250_000, 232_448, "shared memory")
        run(launch)

    monkeypatch.setattr(Launch, "run", maybe)
    monkeypatch.setattr(execute, "_unfit", {})
    return refused


def _step(problem: Problem) -> list[torch.Tensor]:
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight.detach(), *leaf.factors, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, (leaf.x, *leaf.factors[:4]), leaf.grad)]


@pytest.mark.interpreter
def test_a_refused_kernel_runs_over_panels_from_then_on(
    device: torch.device, refusing: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With a line in the log for each pass, once."""
    problem = gaussian(5, 40, 50, 4, 4, dtype=torch.bfloat16, device=device)
    set_strategy("panels")
    expected = _step(problem)
    set_strategy("auto")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for value, truth in zip(_step(problem), expected, strict=True):
                assert torch.equal(value, truth)
    assert len(refusing) == 3
    messages = [record.getMessage() for record in caplog.records if "does not fit this chip" in record.getMessage()]
    assert len(messages) == 3
    assert all("250000" in message and "232448" in message for message in messages)


@pytest.mark.interpreter
def test_where_fused_is_asked_for_a_refusal_is_an_error(device: torch.device, refusing: list[Any]) -> None:
    problem = gaussian(5, 40, 50, 4, 4, dtype=torch.bfloat16, device=device)
    set_strategy("fused")
    with pytest.raises(ValueError, match=r"^strategy: got 'fused', .*does not fit this chip"):
        _step(problem)
