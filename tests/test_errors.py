"""The error table: every wrong argument is refused before anything changes, with its name and value in the message."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    DualLoraWarmup,
    dual_lora_delta,
    dual_lora_linear,
    dual_lora_merge_,
    dual_lora_parameter_groups,
    dual_lora_state_dict,
    merge_dual_lora,
    set_default_backend,
    set_workspace_bytes,
)
from dual_lora_kernels.runtime_settings import current_settings, default_backend
from dual_lora_kernels.self_check.problems import gaussian

M, N, K, R1, R2 = 3, 5, 4, 2, 3
FP8 = torch.float8_e4m3fn


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of `dual_lora_linear` that are right, but for `changes`."""
    p = gaussian(M, N, K, R1, R2)
    right = {"input": p.x, "weight": p.weight, "A": p.A, "B": p.B, "C": p.C, "D": p.D, "scale": p.scale, "bias": p.bias}
    return right | changes


def names(name: str, value: object) -> str:
    """A pattern: the message begins with the argument's name and tells the value it got."""
    return rf"^{re.escape(name)}: got .*{re.escape(str(value))}"


@pytest.fixture(autouse=True)
def _refused_settings_do_not_stick() -> Iterator[None]:
    before = default_backend(), current_settings()
    yield
    assert (default_backend(), current_settings()) == before


# --- tensors --------------------------------------------------------------------------------------------------------

WRONG_SHAPES = [
    ("input", (M, K + 1), None),
    ("input", (K + 1,), None),
    ("input", (), None),
    ("input", (2, M, 1), None),
    ("weight", (K, N), None),
    ("weight", (N,), None),
    ("weight", (1, N, K), None),
    ("bias", (N + 1,), None),
    ("bias", (1,), None),
    ("bias", (), None),
    ("bias", (1, N), None),
    ("A", (R1 * K,), None),
    ("A", (1, R1, K), None),
    ("A", (0, K), None),
    ("A", (R1 + 1, K), "B"),  # A sets the rank, so B is what does not fit
    ("A", (R1, K + 1), "C"),  # A sets in_features
    ("B", (N, R1 + 1), None),
    ("B", (N, 0), None),
    ("B", (N,), None),
    ("B", (N + 1, R1), "D"),  # B sets out_features
    ("C", (R2, K + 1), None),
    ("C", (0, K), None),
    ("C", (), None),
    ("C", (R2 + 1, K), "D"),
    ("D", (N + 1, R2), None),
    ("D", (N, R2 + 1), None),
    ("D", (N, 0), None),
]


@pytest.mark.parametrize(("argument", "shape", "named"), WRONG_SHAPES)
def test_wrong_shapes(argument: str, shape: tuple[int, ...], named: str | None) -> None:
    call = arguments(**{argument: torch.zeros(shape)})
    value = tuple(call[named or argument].shape)
    with pytest.raises(ValueError, match=names(named or argument, value)):
        dual_lora_linear(**call)


def test_both_ranks_zero() -> None:
    with pytest.raises(ValueError, match=names("A", (0, K))):
        dual_lora_linear(**arguments(A=torch.zeros(0, K), B=torch.zeros(N, 0)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, FP8])
@pytest.mark.parametrize("argument", ["input", "weight", "A", "B", "C", "D", "bias", "scale"])
def test_unsupported_dtypes(argument: str, dtype: torch.dtype) -> None:
    call = arguments()
    call[argument] = torch.zeros(call[argument].shape).to(dtype)
    with pytest.raises(TypeError, match=names(f"{argument}.dtype", dtype)):
        dual_lora_linear(**call)


@pytest.mark.parametrize("argument", ["B", "C", "D"])
def test_mixed_factor_dtypes(argument: str) -> None:
    call = arguments()
    call[argument] = call[argument].bfloat16()
    with pytest.raises(TypeError, match=names(f"{argument}.dtype", torch.bfloat16)):
        dual_lora_linear(**call)


@pytest.mark.parametrize("argument", ["input", "weight", "B", "C", "D", "bias", "scale"])
def test_mixed_devices(argument: str) -> None:
    call = arguments()
    call[argument] = call[argument].to("meta")
    with pytest.raises(ValueError, match=names(f"{argument}.device", "meta")):
        dual_lora_linear(**call)


@pytest.mark.parametrize(("argument", "value"), [("input", [[1.0]]), ("weight", "W0"), ("A", None), ("bias", 0.0)])
def test_arguments_that_are_no_tensors(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=names(argument, value)):
        dual_lora_linear(**arguments(**{argument: value}))


# --- scale ----------------------------------------------------------------------------------------------------------

BAD_SCALES: list[tuple[Any, type[Exception], str]] = [
    (math.nan, ValueError, names("scale", "nan")),
    (math.inf, ValueError, names("scale", "inf")),
    (-math.inf, ValueError, names("scale", "-inf")),
    (torch.tensor(math.nan), ValueError, names("scale", "nan")),
    (torch.tensor(math.inf), ValueError, names("scale", "inf")),
    (torch.zeros(1), ValueError, names("scale", "(1,)")),
    (torch.zeros(N, 1), ValueError, names("scale", "(5, 1)")),
    (torch.zeros((), requires_grad=True), ValueError, r"^scale: got .*requires grad"),
    (torch.tensor(1), TypeError, names("scale.dtype", torch.int64)),
    (torch.zeros((), dtype=torch.bfloat16), TypeError, names("scale.dtype", torch.bfloat16)),
    ("big", TypeError, names("scale", "'big'")),
    (1e39, ValueError, names("scale", "1e+39")),
    (10**400, ValueError, names("scale", "1000")),
    (1j, TypeError, names("scale", "1j")),
    (True, TypeError, names("scale", "True")),
    (None, TypeError, names("scale", "None")),
]


@pytest.mark.parametrize(("scale", "error", "message"), BAD_SCALES)
@pytest.mark.parametrize("trains", [False, True])
def test_bad_scales(scale: Any, error: type[Exception], message: str, trains: bool) -> None:
    call = arguments(scale=scale)
    call["A"].requires_grad_(trains)
    with pytest.raises(error, match=message):
        dual_lora_linear(**call)


@pytest.mark.parametrize(("scale", "error", "message"), BAD_SCALES)
def test_bad_scales_change_no_weight(scale: Any, error: type[Exception], message: str) -> None:
    call = arguments(scale=scale)
    del call["input"], call["bias"]
    before = call["weight"].clone()
    with pytest.raises(error, match=message):
        dual_lora_merge_(**call)
    assert torch.equal(call.pop("weight"), before)
    with pytest.raises(error, match=message):
        dual_lora_delta(**call)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layers_bad_scale(value: float) -> None:
    """However it came into the buffer: nothing is computed with it, merged, or half merged in a model."""
    model = nn.Sequential(DualLoraLinear(K, K, r1=R1, r2=R2), DualLoraLinear(K, K, r1=R1, r2=R2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "scale" not in name}
    with pytest.raises(ValueError, match=names("scale", value)):
        model[1].set_scale(value)
    assert model[1].scale.isfinite()
    model[1].scale.fill_(value)
    with pytest.raises(ValueError, match=names("scale", value)):
        model(torch.zeros(1, K))
    with pytest.raises(ValueError, match=names("scale", value)):
        model[1].merge()
    assert not model[1].merged
    with pytest.raises(ValueError, match=r"^1\.scale: got (nan|inf)"):
        merge_dual_lora(model)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


# --- options --------------------------------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    ("ste", "identity", ValueError),
    ("ste", None, ValueError),
    ("rounding", "stochastic", ValueError),
    ("rounding", True, ValueError),
    ("clip_bound", -0.5, ValueError),
    ("clip_bound", math.nan, ValueError),
    ("clip_bound", math.inf, ValueError),
    ("clip_bound", "1", TypeError),
]
BAD_HYPERPARAMETERS: list[tuple[str, Any, type[Exception]]] = [
    *BAD_OPTIONS,
    *((rank, value, ValueError) for rank in ("r1", "r2") for value in (0, -1)),
    *((rank, value, TypeError) for rank in ("r1", "r2") for value in (True, 8.0, "8", None)),
    *(("gradient_columns", value, ValueError) for value in (0.0, -0.5, 1.5, math.nan)),
    ("gradient_columns", "half", TypeError),
    ("alpha", math.nan, ValueError),
    ("alpha", math.inf, ValueError),
    ("alpha", "32", TypeError),
    ("dropout", -0.1, ValueError),
    ("dropout", 1.5, ValueError),
    ("dropout", math.nan, ValueError),
    ("dropout", True, TypeError),
    ("init_std", -0.02, ValueError),
    ("init_std", math.nan, ValueError),
    ("adapter_dtype", torch.int8, TypeError),
    ("adapter_dtype", FP8, TypeError),
]


@pytest.mark.parametrize(("option", "value", "error"), [*BAD_OPTIONS, ("backend", "cuda", ValueError)])
def test_bad_options_of_a_call(option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=names(option, value)):
        dual_lora_linear(**arguments(), **{option: value})


@pytest.mark.parametrize(("option", "value"), [("rounding", "up"), ("backend", "cuda")])
def test_bad_options_of_a_merge(option: str, value: str) -> None:
    call = arguments()
    del call["input"], call["bias"]
    before = call["weight"].clone()
    with pytest.raises(ValueError, match=names(option, value)):
        dual_lora_merge_(**call, **{option: value})
    assert torch.equal(call["weight"], before)


@pytest.mark.parametrize(("option", "value", "error"), BAD_HYPERPARAMETERS)
@pytest.mark.parametrize("construct", ["layer", "from_linear", "config"])
def test_bad_hyperparameters(construct: str, option: str, value: Any, error: type[Exception]) -> None:
    plain = nn.Linear(K, N)
    constructors: dict[str, Any] = {
        "layer": functools.partial(DualLoraLinear, K, N),
        "from_linear": functools.partial(DualLoraLinear.from_linear, plain),
        "config": DualLoraConfig,
    }
    with pytest.raises(error, match=names(option, value)):
        constructors[construct](**{option: value})
    assert plain.weight.requires_grad


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("in_features", 0, ValueError),
        ("in_features", 4.0, TypeError),
        ("out_features", -1, ValueError),
        ("out_features", True, TypeError),
        ("dtype", torch.int8, TypeError),
        ("dtype", FP8, TypeError),
    ],
)
def test_bad_sizes_and_dtypes_of_a_layer(option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=names(option, value)):
        DualLoraLinear(**{"in_features": K, "out_features": N} | {option: value})


@pytest.mark.parametrize("value", [[], None, [""], [3], ["q_proj", None], "q_proj["])
def test_bad_target_modules(value: Any) -> None:
    with pytest.raises(ValueError, match=names("target_modules", value)):
        DualLoraConfig(target_modules=value)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1e6, TypeError), (True, TypeError)])
def test_bad_workspace(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=names("count", value)):
        set_workspace_bytes(value)


def test_unknown_default_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend: got 'cuda', expected one of 'auto', .*'eager'"):
        set_default_backend("cuda")


@pytest.mark.parametrize("option", ["lr", "direction_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_bad_rates(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=names(option, value)):
        dual_lora_parameter_groups(DualLoraLinear(K, N), **{"lr": 1e-3} | {option: value})


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-5, ValueError), (2.5, TypeError)])
def test_bad_warm_up(steps: Any, error: type[Exception]) -> None:
    layer = DualLoraLinear(K, N)
    with pytest.raises(error, match=names("steps", steps)):
        DualLoraWarmup(layer, steps)
    assert layer.scale.item() == layer.full_scale
    with pytest.raises(ValueError, match=names("step", -1)):
        DualLoraWarmup(layer, 4).set_step(-1)


@pytest.mark.parametrize(
    "use",
    [merge_dual_lora, dual_lora_state_dict, lambda model: DualLoraWarmup(model, 3),
     lambda model: dual_lora_parameter_groups(model, 1e-3)],
)  # fmt: skip
def test_a_model_without_dual_lora_layers(use: Any) -> None:
    with pytest.raises(ValueError, match=r"^model: got Sequential without Dual LoRA layers"):
        use(nn.Sequential(nn.Linear(K, N)))


# --- what differentiates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["input", "A", "D"])
def test_double_backward(argument: str) -> None:
    call = arguments()
    leaf = call[argument].requires_grad_()
    (grad,) = torch.autograd.grad(dual_lora_linear(**call).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="dual_lora_linear is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("argument", ["input", "weight", "A", "D", "bias"])
@pytest.mark.parametrize(
    "transform",
    [
        torch.vmap,
        lambda f: torch.func.grad(lambda t: f(t).sum()),
        lambda f: lambda t: torch.func.jvp(f, (t,), (t,)),
        lambda f: lambda t: torch.func.vjp(f, t),
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
    ],
    ids=["vmap", "grad", "jvp", "vjp", "jacrev", "jacfwd", "hessian"],
)
def test_functorch_transforms(transform: Any, argument: str) -> None:
    call = arguments()
    value = call.pop(argument)
    with pytest.raises(NotImplementedError, match="dual_lora_linear does not support functorch transforms"):
        transform(lambda t: dual_lora_linear(**call, **{argument: t}))(value)


@pytest.mark.parametrize("trains", [False, True])
def test_forward_mode_differentiation(trains: bool) -> None:
    """No tangent is lost silently."""
    call = arguments()
    call["A"].requires_grad_(trains)
    with torch.autograd.forward_ad.dual_level():
        call["input"] = torch.autograd.forward_ad.make_dual(call["input"], call["input"])
        with pytest.raises(NotImplementedError):
            dual_lora_linear(**call)


@pytest.mark.parametrize(("n", "k", "name"), [(0, 4, "B"), (4, 0, "A")])
def test_no_features(n: int, k: int, name: str) -> None:
    x, A, B = torch.zeros(2, k), torch.zeros(2, k), torch.zeros(n, 2)
    with pytest.raises(ValueError, match=rf"^{name}: got shape .*expected at least one feature"):
        dual_lora_linear(x, None, A, B, A, B, 1.0)
