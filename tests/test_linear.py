"""`DualLoraLinear` as a user meets it: construction, forward, dropout, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dual_lora_kernels import DualLoraLinear
from dual_lora_kernels.adapter import FACTOR_NAMES

from .layers import DTYPES, LOW, K, N, expected, make

# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_constructor_mirrors_nn_linear(dtype: torch.dtype, bias: bool) -> None:
    """Same positional arguments, shapes and dtypes, and from one seed the same base weight and bias."""
    torch.manual_seed(7)
    plain = nn.Linear(K, N, bias, dtype=dtype)
    torch.manual_seed(7)
    layer = DualLoraLinear(K, N, bias, r1=4, r2=3, dtype=dtype)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.weight.dtype == dtype
    assert (layer.bias is None) == (plain.bias is None)
    if bias:
        assert layer.bias is not None
        assert torch.equal(layer.bias, plain.bias)
    assert {name: tuple(getattr(layer, name).shape) for name in FACTOR_NAMES} == {
        "A": (4, K), "B": (N, 4), "C": (3, K), "D": (N, 3)
    }  # fmt: skip
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == set(FACTOR_NAMES)
    assert layer.scale.shape == ()
    assert layer.scale.dtype == torch.float32
    assert layer.scale.item() == torch.tensor(32.0 / math.sqrt(12)).item()


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "factors"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(dtype: torch.dtype, adapter_dtype: torch.dtype | None, factors: torch.dtype) -> None:
    layer = make(dtype, adapter_dtype=adapter_dtype)
    assert {getattr(layer, name).dtype for name in FACTOR_NAMES} == {factors}
    assert DualLoraLinear.from_linear(nn.Linear(K, N, dtype=dtype), adapter_dtype=adapter_dtype).A.dtype == factors


def test_default_dtype_and_device_contexts_hold() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert make(None).weight.dtype == torch.float64  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert {t.device.type for t in DualLoraLinear(K, N).state_dict().values()} == {"meta"}


def test_factors_start_gaussian() -> None:
    layer = DualLoraLinear(400, 300, r1=16, r2=16, init_std=0.05)
    for name in FACTOR_NAMES:
        factor = getattr(layer, name)
        assert factor.std().item() == pytest.approx(0.05, rel=0.1)
        assert abs(factor.mean().item()) < 0.005


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_linear_shares_and_freezes(dtype: torch.dtype, bias: bool) -> None:
    plain = nn.Linear(K, N, bias, dtype=dtype).eval()
    before = plain.weight.data_ptr()
    layer = DualLoraLinear.from_linear(plain, r1=4, r2=3)
    assert layer.weight is plain.weight
    assert layer.weight.data_ptr() == before
    assert layer.bias is plain.bias
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert not layer.training
    assert (layer.in_features, layer.out_features) == (K, N)


def test_from_linear_rejects_other_modules() -> None:
    with pytest.raises(ValueError, match="linear: got Conv2d"):
        DualLoraLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"linear: got DualLoraLinear.*already"):
        DualLoraLinear.from_linear(make())


def test_a_failing_from_linear_leaves_the_linear_trainable() -> None:
    plain = nn.Linear(K, N)
    with pytest.raises(ValueError, match="r1: got 0"):
        DualLoraLinear.from_linear(plain, r1=0)
    assert plain.weight.requires_grad


def test_repr_names_what_matters() -> None:
    layer = make(ste="xnor", rounding="nearest", bias=False)
    for part in ("in_features=24", "out_features=20", "bias=False", "r1=4", "r2=3", "alpha=2", "'xnor'", "'nearest'"):
        assert part in repr(layer)
    assert "merged" not in repr(layer)
    layer.merge()
    assert "merged" in repr(layer)


# --- forward --------------------------------------------------------------------------------------------------------


@given(
    m=st.integers(0, 9), n=st.integers(1, 30), k=st.integers(1, 30), r1=st.integers(1, 6), r2=st.integers(1, 6),
    bias=st.booleans(), dtype=st.sampled_from([*DTYPES, torch.float64]), seed=st.integers(0, 99),
)  # fmt: skip
def test_forward_is_the_references(
    m: int, n: int, k: int, r1: int, r2: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    layer = make(dtype, k, n, seed, r1=r1, r2=r2, bias=bias)
    x = torch.randn(m, k).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected(layer, x))


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (2, 0, K), (2, 3, 2, K)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = make()
    x = torch.randn(shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], N)
    torch.testing.assert_close(out, expected(layer, x))


def test_mixed_dtypes_train() -> None:
    """bf16 base and input with fp32 factors, the common case: gradients come in each tensor's dtype."""
    layer = make(torch.bfloat16)
    x = torch.randn(7, K, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().pow(2).sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    for name in FACTOR_NAMES:
        assert getattr(layer, name).grad.dtype == torch.float32
        assert getattr(layer, name).grad.norm() > 0
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", LOW)
def test_autocast(dtype: torch.dtype) -> None:
    """On an fp32 layer, the output is what casting the input alone gives: W0 and factors are read as they are."""
    layer = make()
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype):
        out = layer(x)
    assert out.dtype == dtype
    assert torch.equal(out, layer(x.to(dtype)))
    out.float().sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Recomputation gives the same gradients bit for bit, with dropout as well."""
    layer = make(dropout=0.3)
    x = torch.randn(6, K, requires_grad=True)

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        layer.zero_grad()
        loss = run(x).pow(2).sum()
        loss.backward()
        found = (x.grad, *(getattr(layer, name).grad for name in FACTOR_NAMES))
        x.grad = None
        return found

    plain = gradients(layer)
    again = gradients(lambda t: checkpoint(layer, t, use_reentrant=reentrant))
    for name, one, other in zip(("x", *FACTOR_NAMES), plain, again, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_trainable_weight_and_bias(dropout: float) -> None:
    """With requires_grad set, the base trains too: ∂W0 = Gᵀ X and ∂b = Σ G, dropout or not."""
    layer = make(torch.float64, dropout=dropout)
    layer.weight.requires_grad_()
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x, grad = torch.randn(6, K, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    layer(x).backward(grad)
    torch.testing.assert_close(layer.weight.grad, grad.t() @ x)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


# --- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    layer, x = make(dropout=0.5), torch.randn(5, K)
    with_dropout = layer(x)
    out = layer.eval()(x)
    assert torch.equal(out, make()(x))
    assert not torch.allclose(out, with_dropout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_spares_the_base_path(dtype: torch.dtype) -> None:
    """With zero factors the output is the base layer's exactly, whatever was dropped."""
    layer, x = make(dtype, dropout=0.5), torch.randn(5, K).to(dtype)
    for name in FACTOR_NAMES:
        nn.init.zeros_(getattr(layer, name))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_dropout_is_unbiased() -> None:
    """The mean over many draws nears the output without dropout; rows of one batch are independent draws."""
    layer, draws = make(torch.float64, dropout=0.5), 40_000
    x = torch.randn(K, dtype=torch.float64)
    with torch.no_grad():
        outputs = layer(x.expand(draws, K))
        truth = layer.eval()(x)
    deviation = outputs.std(0) / math.sqrt(draws)
    assert (deviation > 0).all()
    assert ((outputs.mean(0) - truth).abs() < 5 * deviation).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("base", "cast"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_nothing_of_the_weights_size_is_saved(dropout: float, base: torch.dtype, cast: torch.dtype) -> None:
    """Neither ΔW nor a copy of W0 in the compute dtype, as every layer would keep one until its backward."""
    layer, x = make(base, dropout=dropout), torch.randn(3, K, requires_grad=True)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", cast):
        layer(x)
    own = layer.weight.untyped_storage().data_ptr()
    assert not [t.shape for t in saved if t.numel() >= N * K and t.untyped_storage().data_ptr() != own]


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("training", [True, False])
def test_warm_up_never_recompiles(training: bool, dropout: float) -> None:
    """fullgraph, so without a graph break; the scale changes, the results follow, the graph is compiled once."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make(dropout=dropout).train(training)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, K)
    outputs = []
    for step in range(5):
        layer.set_scale(0.2 * (step + 1))
        torch.manual_seed(step)
        layer.zero_grad()
        outputs.append(compiled(x))
        outputs[-1].pow(2).sum().backward()
        grad = layer.A.grad
        layer.zero_grad()
        if not (training and dropout):  # compiled dropout draws its own random numbers
            plain = layer(x)
            plain.pow(2).sum().backward()
            torch.testing.assert_close(outputs[-1], plain)
            torch.testing.assert_close(grad, layer.A.grad)
    assert counter.frame_count == 1
    assert not torch.allclose(outputs[0], outputs[-1])
