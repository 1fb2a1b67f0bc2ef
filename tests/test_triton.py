"""What only the Triton backend has: tile shapes, fused kernels, splits, rank slices, 64-bit offsets, its refusals."""

from __future__ import annotations

import pytest
import torch

from dual_lora_kernels import dual_lora_linear, dual_lora_merge_, reference, set_strategy
from dual_lora_kernels.backends import Block, DenseBase, Estimator, ParameterGradients, Settings, resolve_backend
from dual_lora_kernels.backends.triton import device_buffers, execute, launches
from dual_lora_kernels.backends.triton.architecture import Architecture, architecture
from dual_lora_kernels.backends.triton.arguments import Hashes
from dual_lora_kernels.backends.triton.choice import preferred
from dual_lora_kernels.backends.triton.shapes import TABLE, PanelShape, ProductShape
from dual_lora_kernels.self_check.problems import Problem, autograd_gradients, exact, gaussian, relative_error

from .bits import bits

pytestmark = pytest.mark.interpreter
LOW = [torch.bfloat16, torch.float16]
ROOM = Settings("auto", 1 << 25)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU in the interpreter, or the GPU."""
    return torch.device(request.param)


def _chip(device: torch.device) -> Architecture:
    chip = architecture(device)
    assert isinstance(chip, Architecture)
    return chip


def _shipped(*kernels: str) -> list[PanelShape | ProductShape]:
    """Every distinct tile shape of the kernels for 16-bit computation: all families', on a GPU only its own."""
    families = [name for name in TABLE if not name.startswith("any")]
    if torch.cuda.is_available():
        families = [_chip(torch.device("cuda")).family]
    entries = [getattr(TABLE[family], kernel) for family in families for kernel in kernels]
    shapes = [shape for entry in entries for shape in (entry if isinstance(entry, tuple) else (entry,))]
    return list({_tile(shape): shape for shape in shapes}.values())


def _tile(shape: PanelShape | ProductShape) -> str:
    if isinstance(shape, PanelShape):
        return f"{shape.rows}x{shape.columns}"
    return f"{shape.block_m}x{shape.block_n}x{shape.block_k}"


def _hashes(problem: Problem) -> Hashes:
    return device_buffers.hashes(problem.x, "dither", *problem.weight.shape)


@pytest.mark.parametrize("shape", _shipped("effective_weight"), ids=_tile)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_panels_of_every_shipped_shape(device: torch.device, dtype: torch.dtype, shape: PanelShape) -> None:
    """W has the reference's bits under exact arithmetic, and for Gaussian factors those of the shape in use."""
    rows, columns = shape.rows + 5, shape.columns + 3
    for make in (exact, gaussian):
        problem = make(1, rows, columns, 5, 20, dtype=dtype, device=device)
        out = torch.empty_like(problem.weight)
        block = problem.block()
        launches.effective_weight(out, block, _hashes(problem), shape, _chip(device)).run()
        if make is exact:
            expected = reference.effective_weight(problem.weight, *problem.factors, dtype, "dither")
        else:
            expected = torch.empty_like(out)
            execute.effective_weight(expected, block)
        assert torch.equal(bits(out), bits(expected)), make.__name__


@pytest.mark.parametrize("operation", ["forward", "input_gradient"])
@pytest.mark.parametrize("shape", _shipped("forward", "input_gradient"), ids=_tile)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fused_products_use_the_merged_weights(
    device: torch.device, dtype: torch.dtype, shape: ProductShape, operation: str
) -> None:
    """The identity as input returns W itself, whichever shape built it: bit for bit what merging writes."""
    transposed = operation == "input_gradient"
    first, second = shape.block_n + 3, min(shape.block_k + 5, 70)
    out_features, in_features = (second, first) if transposed else (first, second)
    for make in (exact, gaussian):
        problem = make(1, out_features, in_features, 5, 20, dtype=dtype, device=device)
        problem.scale.fill_(2.0**-7)
        merged = dual_lora_merge_(problem.weight.clone(), *problem.factors, backend="triton")
        identity = torch.eye(second, dtype=dtype, device=device)
        out = torch.empty(second, first, dtype=dtype, device=device)
        launches.weight_product(
            operation, out, identity, problem.block(), None, _hashes(problem), shape, _chip(device)
        ).run()
        used = out if transposed else out.t()
        # Values, since the product's sum turns a -0 into +0; everything else that is equal has equal bits.
        assert torch.equal(used, merged), make.__name__


@pytest.mark.parametrize("shape", _shipped("factor_gradients", "token_product"), ids=_tile)
@pytest.mark.parametrize("ste", ["clip", "xnor"])
def test_gradients_of_every_shipped_shape(device: torch.device, shape: PanelShape | ProductShape, ste: str) -> None:
    """All four factors' gradients have the reference's bits under exact arithmetic: ∂P and ∂Q fit in bf16."""
    rows, columns = (
        (shape.rows + 5, 3 * shape.columns + 3)
        if isinstance(shape, PanelShape)
        else (shape.block_m + 5, shape.block_n + 3)
    )
    problem = exact(5, rows, columns, 3, 20, dtype=torch.bfloat16, device=device)
    truth = autograd_gradients(problem.to(torch.float32), ste=ste, clip_bound=0.5)[3:7]
    gradients = ParameterGradients(*(torch.zeros_like(f) for f in problem.factors[:4]))
    estimator, chip = Estimator(ste, 0.5), _chip(device)
    h = problem.grad.float().t() @ problem.x.float()
    if isinstance(shape, PanelShape):
        # Two groups of two column tiles.
        partials = execute._partials(
            h, (len(h), h.shape[1]), sum(problem.factors.ranks), (shape.rows, shape.columns), most_programs=4
        )
        launches.factor_gradients(h, problem.block(), estimator, gradients, partials, shape, chip).run()
    else:
        partials = execute._partials(
            h, (len(h), h.shape[1]), sum(problem.factors.ranks), (shape.block_m, shape.block_n), most_programs=None
        )
        launches.token_product(
            problem.grad, problem.x, problem.block(), estimator, gradients, partials, shape, chip
        ).run()
    launches.add_partials(gradients, problem.factors.ranks, partials).run()
    for name, value, expected in zip("ABCD", gradients[:4], truth, strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("mode", ["panels", "fused"])
@pytest.mark.parametrize("ranks", [(1, 4), (12, 24), (32, 16), (33, 1), (65, 100), (130, 7)], ids=str)
def test_any_ranks(device: torch.device, mode: str, ranks: tuple[int, int]) -> None:
    """Padded, masked and sliced ranks, r1 ≠ r2."""
    problem = exact(8, 40, 70, *ranks, dtype=torch.bfloat16, device=device)
    expected = autograd_gradients(problem.to(torch.float32))
    set_strategy(mode)
    merged = dual_lora_merge_(problem.weight.clone(), *problem.factors, backend="triton")
    assert torch.equal(merged, reference.effective_weight(problem.weight, *problem.factors, torch.bfloat16, "dither"))
    leaf = problem.requiring_grad()
    if mode == "fused" and max(ranks) > execute.fused_rank_limit(problem.x):
        with pytest.raises(ValueError, match="up to which fused kernels fit this chip"):
            dual_lora_linear(leaf.x, leaf.weight, *leaf.factors, backend="triton")
        return
    out = dual_lora_linear(leaf.x, leaf.weight.detach(), *leaf.factors, leaf.bias, backend="triton")
    computed = torch.autograd.grad(out, leaf.factors[:4], leaf.grad)
    for name, value, truth in zip("ABCD", computed, expected[3:7], strict=True):
        assert torch.equal(value, truth), name


@pytest.mark.parametrize("operation", ["forward", "input_gradient"])
@pytest.mark.parametrize("bias", [False, True])
def test_split_sums(device: torch.device, operation: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens on many processors: the sum is split, and no part is lost, doubled or given the bias twice."""
    problem = exact(3, 70, 600, 4, 4, dtype=torch.bfloat16, device=device)
    transposed = operation == "input_gradient"
    if transposed:
        problem = exact(3, 600, 70, 4, 4, dtype=torch.bfloat16, device=device)
    chip = Architecture(_chip(device).family, compute_units=64)
    shape = chip.shapes(2).weight_product(operation, 3, 70, 600)
    splits = execute._split_k(3, 70, 600, 99, shape, chip)
    assert splits > 1
    assert (splits - 1) * launches.split_length(600, splits, shape) < 600
    monkeypatch.setattr(execute, "_architecture", lambda _: chip)
    rounded = reference.effective_weight(problem.weight, *problem.factors, torch.bfloat16, "dither")
    input = problem.grad if transposed else problem.x
    added = problem.bias if bias and not transposed else None
    computed = execute.weight_product(operation, input, problem.block(), added, ROOM)
    truth = input.double() @ (rounded if transposed else rounded.t()).double()
    truth = truth if added is None else truth + added.double()
    assert relative_error(computed, truth) <= relative_error(truth.to(torch.bfloat16), truth) * 1.01


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_is_not_finite_stays_so(device: torch.device, dtype: torch.dtype) -> None:
    """NaN of either sign and any payload and infinities in W0, and NaN from the factors, under the dither."""
    problem = exact(1, 40, 70, 4, 4, dtype=dtype, device=device)
    patterns = torch.tensor([0x7FFF, -1, 0x7FC1, -0x3F], dtype=torch.int16, device=device)  # NaN in bf16 and fp16
    problem.weight[0, :4] = patterns.view(dtype)
    assert problem.weight[0, :4].isnan().all()
    problem.weight[1, 0], problem.weight[1, 1] = torch.inf, -torch.inf
    problem.B[2] = torch.nan
    problem.B[3].view(torch.int32).fill_(-1)  # a negative NaN, all bits set
    out = torch.empty_like(problem.weight)
    execute.effective_weight(out, problem.block())
    assert out[0, :4].isnan().all()
    assert out[1, 0] == torch.inf
    assert out[1, 1] == -torch.inf
    assert out[2:4].isnan().all()
    rest = torch.ones_like(out, dtype=torch.bool)
    rest[0, :4], rest[1, :2], rest[2:4] = False, False, False
    assert out[rest].isfinite().all()


def test_an_infinite_gradient_stays_in_its_row(device: torch.device) -> None:
    """Masked lanes multiply it by the zeros of columns that are not there; those must not reach the sums."""
    problem = exact(8, 20, 70, 4, 4, dtype=torch.bfloat16, device=device)
    problem.grad[0, 3] = torch.inf
    problem.x[0].abs_().add_(1)
    results = []
    for mode in ("panels", "fused"):
        set_strategy(mode)
        leaf = problem.requiring_grad()
        out = dual_lora_linear(leaf.x, leaf.weight.detach(), *leaf.factors, backend="triton")
        results.append(torch.autograd.grad(out, (leaf.B, leaf.D), leaf.grad))
    for over_panels, fused in zip(*results, strict=True):
        assert torch.equal(over_panels.isnan(), fused.isnan())
        assert torch.equal(over_panels.nan_to_num(), fused.nan_to_num())
    grad_B, _ = results[1]
    assert grad_B[:3].isfinite().all()
    assert grad_B[4:].isfinite().all()


def test_splits_stay_within_the_workspace() -> None:
    """Parts of a sum are a temporary of tokens × features numbers each."""
    chip = Architecture("sm_90", compute_units=132)
    shape = chip.shapes(2).weight_product("forward", 64, 0, 0)
    assert execute._split_k(64, 1024, 4096, 99, shape, chip) > 3
    assert execute._split_k(64, 1024, 4096, 3, shape, chip) <= 3
    assert execute._split_k(64, 1024, 4096, 0, shape, chip) == 1


def test_the_dithers_vectors_are_never_released(device: torch.device) -> None:
    """A captured CUDA graph keeps the address of those it used."""
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    before = device_buffers.hashes(like, "dither", 10, 10)
    larger = device_buffers.hashes(like, "dither", 10, 300_000)
    assert len(larger.columns) > 300_000
    assert any(vectors is before for vectors in device_buffers._hashes[like.device])
    assert torch.equal(larger.rows[: len(before.rows)], before.rows)


def test_offsets_beyond_32bits(device: torch.device) -> None:
    """A weight whose last element is more than 2³¹ elements after its first; untouched pages cost nothing."""
    rows, columns, stride = 70, 40, 2**25
    storage = torch.empty((rows - 1) * stride + columns, dtype=torch.bfloat16, device=device)
    weight = storage.as_strided((rows, columns), (stride, 1))
    problem = exact(2, rows, columns, 4, 4, dtype=torch.bfloat16, device=device)
    weight.copy_(problem.weight)
    block = Block(DenseBase(weight), problem.factors, "dither", torch.bfloat16)
    out = execute.weight_product("forward", problem.x, block, None, ROOM)
    grad_x = execute.weight_product("input_gradient", problem.grad, block, None, ROOM)
    expected = execute.weight_product("forward", problem.x, problem.block(), None, ROOM)
    truth = execute.weight_product("input_gradient", problem.grad, problem.block(), None, ROOM)
    assert torch.equal(out, expected)
    assert torch.equal(grad_x, truth)
    execute.effective_weight(weight, block)
    assert torch.equal(weight, dual_lora_merge_(problem.weight, *problem.factors, backend="triton"))


def test_shards_use_the_whole_weights_dither(device: torch.device) -> None:
    """A shard's W, from its own factors and its place in the whole, is that part of the whole W."""
    problem = gaussian(1, 50, 60, 4, 4, dtype=torch.bfloat16, device=device)
    problem.scale.fill_(1e-4)
    whole, part = torch.empty_like(problem.weight), torch.empty_like(problem.weight[17:, 21:])
    block = problem.block()
    execute.effective_weight(whole, block)
    execute.effective_weight(part, block.rows(17, 50).columns(21, 60))
    assert torch.equal(part, whole[17:, 21:])


def test_few_tokens_run_fused_and_many_over_panels(device: torch.device) -> None:
    """The choice has one turning point for each pass and dtype."""
    for operation in ("forward", "input_gradient", "token_product"):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            inputs = [torch.empty(2**power, 0, dtype=dtype, device=device) for power in range(20)]
            chosen = [preferred(operation, input) for input in inputs]
            assert chosen[0]
            assert not chosen[-1]
            assert chosen == sorted(chosen, reverse=True)


def test_no_tokens(device: torch.device) -> None:
    problem = gaussian(0, 20, 30, 4, 4, dtype=torch.bfloat16, device=device)
    set_strategy("fused")
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight.detach(), *leaf.factors, leaf.bias, backend="triton")
    assert out.shape == (0, 20)
    for gradient in torch.autograd.grad(out, leaf.factors[:4], leaf.grad):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_factors_that_accumulate_wider_than_the_input_run_over_panels(device: torch.device) -> None:
    """fp64 factors on a bf16 layer: no fused kernel mixes accumulators, and the refusal says so."""
    problem = gaussian(4, 20, 30, 4, 4, dtype=torch.bfloat16, factor_dtype=torch.float64, device=device)
    set_strategy("fused")
    with pytest.raises(ValueError, match="accumulates in two dtypes"):
        dual_lora_linear(problem.x, problem.weight, *problem.factors, backend="triton")
    set_strategy("auto")
    out = dual_lora_linear(problem.x, problem.weight, *problem.factors, problem.bias, backend="triton")
    truth = autograd_gradients(problem)
    assert relative_error(out, truth[0]) < 2.0**-8
    leaf = problem.requiring_grad()
    out = dual_lora_linear(leaf.x, leaf.weight.detach(), *leaf.factors, backend="triton")
    truth = autograd_gradients(problem.to(torch.float64))
    for value, true in zip(torch.autograd.grad(out, leaf.factors[:4], leaf.grad), truth[3:7], strict=True):
        assert relative_error(value, true) < 1e-12  # nothing of H is rounded to 16 bits


@pytest.mark.gpu
def test_a_gpu_runs_on_triton_by_default() -> None:
    backend = resolve_backend("auto", torch.device("cuda"), torch.bfloat16, torch.float32)
    assert backend.name == "triton"
