"""Checks of arguments. Every message names the argument, the value it got and what was expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch.nn.parameter import UninitializedParameter

from .quantised.weight import QuantisedWeight

STRAIGHT_THROUGH_ESTIMATORS = ("clip", "dorefa", "xnor")
ROUNDINGS = ("dither", "nearest")
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_SCALE = torch.finfo(torch.float32).max / 2
"""Of α/√(r1·r2) and of what else a layer keeps in fp32: twice it is finite, which the eager backend's signs need."""
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = sys.float_info.max


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a tensor")
    if isinstance(value, UninitializedParameter):
        raise TypeError(f"{name}: got an uninitialised {type(value).__name__}; run the lazy module once first")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: got a {kind} tensor, expected a dense one of layout torch.strided")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def check_positive_int(name: str, value: object) -> int:
    """Return an integer, NumPy's included, as Python's.

    Raises TypeError unless `value` is an integer, ValueError unless it is at least 1 and below 2³¹.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a positive integer")
    if not 1 <= int(value) <= _LARGEST_INT:
        raise ValueError(f"{name}: got {_shortened(value)}, expected a positive integer of at most {_LARGEST_INT}")
    return int(value)


def check_origin(origin: object) -> None:
    """Raise TypeError unless `origin` is a tuple of two integers, ValueError unless these are indices."""
    if not isinstance(origin, tuple) or len(origin) != 2 or any(type(index) is not int for index in origin):
        raise TypeError(f"origin: got {origin!r}, expected a tuple of two integers, (row, column)")
    if not all(0 <= index <= _LARGEST_INT for index in origin):
        raise ValueError(f"origin: got {origin}, expected a row and a column from 0 to {_LARGEST_INT}")


def check_number(name: str, value: object, low: float = -_LARGEST_FLOAT, high: float = _LARGEST_FLOAT) -> float:
    """Return a real number, NumPy's included, as Python's.

    Raises TypeError unless `value` is a number, ValueError unless it is finite and low <= value <= high.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number")
    number = value if isinstance(value, int) or type(value) is float else _as_float(value)
    # Comparisons rather than math.isfinite, which torch.compile cannot trace for a dynamic float.
    if not low <= number <= high:
        bounds = "" if (low, high) == (-_LARGEST_FLOAT, _LARGEST_FLOAT) else f" in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: got {_shortened(value)}, expected a finite number{bounds}")
    return number


def _as_float(value: float | Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a fraction's
        return math.inf


def _shortened(value: object) -> str:
    """A number as text; integers may have any number of digits."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no decimal of more than 4300 digits
        text = f"{value:#x}"
    return text if len(text) <= 40 else f"{text[:37]}…"


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless the dtype is one that the package computes with."""
    if dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(d) for d in SUPPORTED_DTYPES)
        raise TypeError(f"{name}: got {dtype}, expected one of {supported}")


def check_hyperparameters(
    *,
    r1: int,
    r2: int,
    alpha: float,
    dropout: float,
    init_std: float,
    ste: str,
    clip_bound: float,
    rounding: str,
    gradient_columns: float,
) -> None:
    """Check what a layer and a configuration have in common; ValueError or TypeError names the field."""
    check_positive_int("r1", r1)
    check_positive_int("r2", r2)
    check_number("alpha", alpha)
    check_number("dropout", dropout, 0.0)
    check_number("init_std", init_std, high=LARGEST_SCALE)
    for name, value in (("alpha", alpha), ("init_std", init_std)):
        if value <= 0:
            raise ValueError(f"{name}: got {value!r}, expected a positive number: at zero nothing could train")
    if float(alpha) / math.sqrt(r1 * r2) > LARGEST_SCALE:
        raise ValueError(f"alpha: got {alpha!r}, expected alpha / √(r1·r2) of at most {LARGEST_SCALE:g}, in fp32")
    if dropout >= 1:
        raise ValueError(f"dropout: got {dropout!r}, expected a probability below 1")
    check_estimator(ste, clip_bound)
    check_choice("rounding", rounding, ROUNDINGS)
    check_fraction("gradient_columns", gradient_columns)


def check_fraction(name: str, value: object) -> float:
    """Return a number above 0, and at most 1, as Python's. Raises as `check_number` does."""
    number = check_number(name, value, 0.0, 1.0)
    if number == 0:
        raise ValueError(f"{name}: got {value!r}, expected a fraction above 0, and 1 at most")
    return number


def check_draws(draws: torch.Tensor, A: torch.Tensor) -> None:
    """Check random numbers that choose columns of A, but for their values."""
    check_tensor("draws", draws)
    if draws.dtype != torch.int64:
        raise TypeError(f"draws.dtype: got {draws.dtype}, expected torch.int64")
    if draws.dim() != 1 or not 1 <= draws.shape[0] <= A.shape[1]:
        raise ValueError(
            f"draws: got shape {tuple(draws.shape)}, expected [n] with n from 1 to in_features = {A.shape[1]}, from A"
        )
    if draws.device != A.device:
        raise ValueError(f"draws.device: got {draws.device}, expected {A.device}, where A is")


def check_estimator(ste: str, clip_bound: float) -> float:
    """Check the straight-through estimator's name and return the bound that ``"clip"`` clips to, as Python's number."""
    check_choice("ste", ste, STRAIGHT_THROUGH_ESTIMATORS)
    return check_number("clip_bound", clip_bound, 0.0, LARGEST_SCALE)


def check_factors(A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> tuple[int, int]:
    """Check the four factors against each other and return (in_features, out_features).

    Raises TypeError for a dtype that is unsupported or differs, ValueError for shapes, ranks and devices.
    """
    for name, factor in (("A", A), ("B", B), ("C", C), ("D", D)):
        check_tensor(name, factor)
        check_dtype(f"{name}.dtype", factor.dtype)
        if factor.dtype != A.dtype:
            raise TypeError(f"{name}.dtype: got {factor.dtype}, expected {A.dtype}, which A has")
        if factor.device != A.device:
            raise ValueError(f"{name}.device: got {factor.device}, expected {A.device}, where A is")
        if factor.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(factor.shape)}, expected two dimensions")
    in_features, out_features = A.shape[1], B.shape[0]
    for name, factor, count in (("A", A, in_features), ("B", B, out_features)):
        if count < 1:
            raise ValueError(f"{name}: got shape {tuple(factor.shape)}, expected at least one feature")
    for rank_name, down_name, down, up_name, up in (("r1", "A", A, "B", B), ("r2", "C", C, "D", D)):
        if down.shape[0] < 1:
            raise ValueError(f"{down_name}: got shape {tuple(down.shape)}, expected a rank {rank_name} of at least 1")
        if up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{up_name}: got shape {tuple(up.shape)}, expected [out_features, {rank_name}] with {rank_name} = "
                f"{down.shape[0]}, from {down_name} of shape {tuple(down.shape)}"
            )
        if down.shape[1] != in_features:
            raise ValueError(
                f"{down_name}: got shape {tuple(down.shape)}, expected [{rank_name}, in_features] with in_features = "
                f"{in_features}, from A"
            )
        if up.shape[0] != out_features:
            raise ValueError(
                f"{up_name}: got shape {tuple(up.shape)}, expected [out_features, {rank_name}] with out_features = "
                f"{out_features}, from B"
            )
    return in_features, out_features


def check_weight(weight: torch.Tensor | QuantisedWeight, A: torch.Tensor, in_features: int, out_features: int) -> None:
    """Check a base weight [out_features, in_features] against the factors."""
    if not isinstance(weight, QuantisedWeight):
        check_tensor("weight", weight)
        check_dtype("weight.dtype", weight.dtype)
    if tuple(weight.shape) != (out_features, in_features):
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected [out_features, in_features] = "
            f"{[out_features, in_features]}, from B and A"
        )
    if weight.device != A.device:
        raise ValueError(f"weight.device: got {weight.device}, expected {A.device}, where A is")


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements of a dense tensor may share memory, as those of expanded ones and of sliding windows do.

    True also for the rare strides that only interleave.
    """
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def as_scale_tensor(scale: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the update's scale s as a 0-dim tensor on the factors' device.

    A Python number becomes fp64 beside fp64 factors and fp32 otherwise. A tensor is passed on as it is, so that a
    change in place is seen by compiled graphs and captured CUDA graphs.
    """
    if not isinstance(scale, torch.Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        limit = _LARGEST_FLOAT if dtype == torch.float64 else LARGEST_SCALE
        return torch.full((), check_number("scale", scale, -limit, limit), dtype=dtype, device=like.device)
    check_tensor("scale", scale)
    if scale.dim() != 0:
        raise ValueError(f"scale: got a tensor of shape {tuple(scale.shape)}, expected a 0-dim tensor or a number")
    if scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scale.dtype: got {scale.dtype}, expected torch.float32 or torch.float64")
    if scale.requires_grad:
        raise ValueError("scale: got a tensor that requires grad, expected a constant: no gradient is defined for it")
    if scale.device != like.device:
        raise ValueError(f"scale.device: got {scale.device}, expected {like.device}, where A is")
    return scale


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError if a tensor holds NaN or infinity. Waits for the device."""
    finite = tensor.isfinite()
    if not finite.all():
        raise ValueError(f"{name}: got {tensor[~finite][0].item()}, expected finite values")


def check_scale_value(scale: torch.Tensor) -> None:
    """Raise ValueError if a scale that can be read without waiting for a device is NaN or infinite."""
    if scale.device.type == "cpu" and not math.isfinite(scale.item()):
        raise ValueError(f"scale: got {scale.item()!r}, expected a finite number")
