"""What the operands' precision of two products costs the factors' gradients: H = Gᵀ X, and H's contraction.

    python -m benchmarks.layers.gradient_operands [--rows 1024 --columns 1024 --tokens 2048]

Errors against fp64, emulated on any device: operands are rounded and multiplied in fp64, so that nothing else errs.
FP8 operands have one scale a tensor or a feature, its largest magnitude onto the format's. Activations of transformers
have a few features far larger than the rest, so there are inputs without and with such.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dual_lora_kernels import reference
from dual_lora_kernels.self_check.problems import Problem, gaussian, naive_gradients, relative_error

from ..harness import report
from ..harness.environment import environment, sentence

STEM = "gradient_operands"
RANK = 16
LARGE_FEATURES = 0.01
"""Share of the features that are large, after published statistics of transformers' activations: under a hundredth."""
LARGE_FACTOR = 20.0
FACTORS = "ABCD"
Rounding = Callable[[torch.Tensor], torch.Tensor]


def to_fp8(values: torch.Tensor, dtype: torch.dtype, by_feature: bool = False) -> torch.Tensor:
    """`values` [tokens, features] as numbers of an FP8 `dtype` times one scale, or one a feature, in fp64."""
    largest = values.abs().amax(0) if by_feature else values.abs().max()
    scale = torch.finfo(dtype).max / largest
    return (values * scale).to(torch.float32).to(dtype).double() / scale


def to_bf16(values: torch.Tensor) -> torch.Tensor:
    """`values` rounded to bf16, in fp64."""
    return values.to(torch.bfloat16).double()


@dataclass(frozen=True)
class Variant:
    """How one implementation rounds: X and G before H, H itself, ∂P and ∂Q and the factors before the contraction."""

    name: str
    input: Rounding = to_bf16
    grad: Rounding = to_bf16
    product: Rounding = torch.Tensor.double
    contraction: Rounding = torch.Tensor.double


def _e4m3(values: torch.Tensor) -> torch.Tensor:
    return to_fp8(values, torch.float8_e4m3fn)


def _e4m3_by_feature(values: torch.Tensor) -> torch.Tensor:
    return to_fp8(values, torch.float8_e4m3fn, by_feature=True)


def _e5m2(values: torch.Tensor) -> torch.Tensor:
    return to_fp8(values, torch.float8_e5m2)


VARIANTS = (
    Variant("H in fp32, exact contraction"),
    Variant("H in fp32, bf16 contraction (the Triton kernels)", contraction=to_bf16),
    Variant("H rounded to bf16, exact contraction", product=to_bf16),
    Variant("FP8 E4M3, a scale a feature", input=_e4m3_by_feature, grad=_e4m3_by_feature, contraction=to_bf16),
    Variant("FP8 E4M3 X and G", input=_e4m3, grad=_e4m3, contraction=to_bf16),
    Variant("FP8 E4M3 X, E5M2 G", input=_e4m3, grad=_e5m2, contraction=to_bf16),
)


def gradients(problem: Problem, variant: Variant) -> list[torch.Tensor]:
    """∂A, ∂B, ∂C and ∂D of a bf16 problem with the clipping estimator, in fp64."""
    A, B, C, D, scale = (each.double() for each in problem.factors)
    h = variant.product(variant.grad(problem.grad.double()).t() @ variant.input(problem.x.double()))
    grad_p, grad_q = reference.product_gradients(h, B @ A, D @ C, scale, "clip", 1.0)
    grad_p, grad_q = variant.contraction(grad_p), variant.contraction(grad_q)
    A, B, C, D = (variant.contraction(each) for each in (A, B, C, D))
    return [B.t() @ grad_p, grad_p @ A.t(), D.t() @ grad_q, grad_q @ C.t()]


def measure(rows: int, columns: int, tokens: int, with_large_features: bool, seed: int = 0) -> dict[str, list[float]]:
    """Variant → relative error of ∂A, ∂B, ∂C, ∂D; also of naive bf16 PyTorch."""
    problem = gaussian(tokens, rows, columns, RANK, RANK, dtype=torch.bfloat16, seed=seed)
    if with_large_features:
        large = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) < LARGE_FEATURES
        problem = dataclasses.replace(problem, x=torch.where(large, problem.x * LARGE_FACTOR, problem.x))
    truth = gradients(problem, VARIANTS[0])
    found = {variant.name: gradients(problem, variant) for variant in VARIANTS[1:]}
    found["naive PyTorch, bf16 throughout"] = naive_gradients(problem.to(torch.bfloat16))[3:7]
    return {
        name: [relative_error(value, true) for value, true in zip(values, truth, strict=True)]
        for name, values in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers.gradient_operands", description=__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="out_features (1024)")
    parser.add_argument("--columns", type=int, default=1024, help="in_features (1024)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens (2048)")
    parser.add_argument("--out", type=Path, help=f"folder for {STEM}.json and .md; printed only without")
    options = parser.parse_args(arguments)
    sizes = (options.rows, options.columns, options.tokens)
    console, headings = Console(width=120), ("operands", *(f"∂{factor}" for factor in FACTORS))
    results, paragraphs = {}, [f"# Operands of the gradients' products, {sizes[0]} × {sizes[1]}, M = {sizes[2]}"]
    for inputs, with_large_features in (("Gaussian X", False), ("X with large features", True)):
        results[inputs] = measure(*sizes, with_large_features)
        cells = [[name, *(f"{error:.2e}" for error in errors)] for name, errors in results[inputs].items()]
        report.print_table(f"Relative error against fp64, {inputs}", headings, cells, console)
        paragraphs += [f"{inputs}, relative error against fp64:", report.markdown_table(headings, cells)]
    if options.out is not None:
        described = environment(torch.device("cpu"))
        document = {"environment": described, "sizes": sizes, "relative_errors": results}
        report.write(options.out, STEM, document, [*paragraphs, sentence(described)])


if __name__ == "__main__":
    main()
