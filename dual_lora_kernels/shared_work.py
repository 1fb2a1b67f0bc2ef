"""The passes of a layer shared among threads of the package's own, each with rows or columns of the weight to itself.

For backends whose operations are small (`Backend.wants_threads`): see `backends.workers`.
"""

from __future__ import annotations

from functools import partial

import torch

from . import panels
from .backends import Backend, Block, Estimator, ParameterGradients, Settings
from .backends.workers import run, shares, worker_count


def forward(
    x: torch.Tensor, block: Block, bias: torch.Tensor | None, backend: Backend, settings: Settings
) -> torch.Tensor:
    """`panels.forward`, rows of W shared."""
    parts, settings = _parts(x, block.shape[0], backend, settings)
    if len(parts) == 1:
        return panels.forward(x, block, bias, backend, settings)
    y = x.new_empty(x.shape[0], block.shape[0])

    def share(start: int, stop: int) -> None:
        part = None if bias is None else bias[start:stop]
        y[:, start:stop] = panels.forward(x, block.rows(start, stop), part, backend, settings)

    run([partial(share, *part) for part in parts], x.device)
    return y


def input_gradient(grad: torch.Tensor, block: Block, backend: Backend, settings: Settings) -> torch.Tensor:
    """`panels.input_gradient`, columns of W shared."""
    parts, settings = _parts(grad, block.shape[1], backend, settings)
    if len(parts) == 1:
        return panels.input_gradient(grad, block, backend, settings)
    grad_x = grad.new_empty(grad.shape[0], block.shape[1])

    def share(start: int, stop: int) -> None:
        grad_x[:, start:stop] = panels.input_gradient(grad, block.columns(start, stop), backend, settings)

    run([partial(share, *part) for part in parts], grad.device)
    return grad_x


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    block: Block,
    estimator: Estimator,
    gradients: ParameterGradients,
    backend: Backend,
    settings: Settings,
) -> None:
    """`panels.parameter_gradients`, rows of H shared. Of A and C every share but the first sums its own part."""
    parts, settings = _parts(grad, block.shape[0], backend, settings)
    if len(parts) == 1:
        panels.parameter_gradients(grad, x, block, estimator, gradients, backend, settings)
        return
    own = [gradients, *(gradients.apart() for _ in parts[1:])]

    def share(start: int, stop: int, targets: ParameterGradients) -> None:
        rows, targets = block.rows(start, stop), targets.rows(start, stop)
        panels.parameter_gradients(grad[:, start:stop], x, rows, estimator, targets, backend, settings)

    run([partial(share, *part, targets) for part, targets in zip(parts, own, strict=True)], grad.device)
    for part in own[1:]:
        gradients.add(part)


def _parts(x: torch.Tensor, lines: int, backend: Backend, settings: Settings) -> tuple[list[tuple[int, int]], Settings]:
    """The lines of each thread, and the settings of a share."""
    parts = shares(lines, backend.panel_unit, worker_count(x.device) if backend.wants_threads else 1)
    return parts, settings._replace(workspace=settings.workspace // len(parts))
