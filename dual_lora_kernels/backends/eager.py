"""Plain PyTorch: the formulas in place, over parts of a block on a fixed grid. Runs on every device.

Every intermediate lives in scratch that is allocated once a block. On a CPU that matters more than the arithmetic:
with fresh temporaries the page faults made generating W 3 times slower (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..precision import accumulation_dtype
from ..rounding import column_hashes, dither_, is_dithered, row_hashes
from .block import Base, Block, Factors, ParameterGradients
from .grid import TILE, Part, RankProducts, drawn_groups, parts, spans, tile_count
from .interface import Estimator, FusedPasses, Settings, SharedProducts
from .workers import run, shares, worker_count

_BUFFERS = 6
"""Part-sized temporaries alive at once: P, Q, a third (∂Q or dither bits), and three for masks and estimators."""


class EagerBackend:
    """The backend that is always there, and the fallback."""

    name = "eager"
    panel_unit = TILE
    takes_cpu_dtypes = True
    wants_threads = True
    fused: FusedPasses | None = None
    shared_products: SharedProducts | None = None

    def description(self) -> str:
        return f"plain PyTorch {torch.__version__}"

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        return None

    def why_not_auto(self, device: torch.device) -> str | None:
        return None

    def reads(self, base: Base) -> bool:
        return base.dense is not None

    def weight_temporaries(self, workspace: int) -> int:
        # Fewer, larger parts beat parts that fit in an L2 cache: 1.4 against 1.7 floors a step (docs/decisions.md).
        return workspace // 2

    def gradient_temporaries(self, workspace: int, factors: Factors) -> int:
        return self.weight_temporaries(workspace)

    def effective_weight(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        for own, part, _ in block.pieces(self, out, block.loading_bytes(self, settings.workspace)):
            self._share(part, own, settings)

    def _share(self, out: torch.Tensor, block: Block, settings: Settings) -> None:
        weight = block.dense_base
        rows = shares(out.shape[0], TILE, worker_count(out.device), block.row0 % TILE)
        settings = settings._replace(workspace=settings.workspace // len(rows))
        run(
            [
                partial(self._write, out[a:b], None if weight is None else weight[a:b], block.rows(a, b), settings)
                for a, b in rows
            ],
            out.device,
        )

    def _write(self, out: torch.Tensor, weight: torch.Tensor | None, block: Block, settings: Settings) -> None:
        products = RankProducts(block.factors, block.origin)
        dithers = is_dithered(block.dtype, block.rounding)
        most, p_scratch, q_scratch = self._scratch(out, block, products.dtype, settings)
        bits = out.new_empty(p_scratch.numel() if dithers else 0, dtype=torch.int32)
        (row0, col0), (n, k) = block.origin, block.shape
        hashes = row_hashes(row0, n, out.device)[:, None], column_hashes(col0, k, out.device)
        for part in parts(block.origin, out.shape, most):
            update = _update_(*products.write(part, p_scratch, q_scratch), block.factors.scale)
            target = part.tiles(part.of(out))
            base = None if weight is None else part.tiles(part.of(weight))
            if dithers:
                total = update if base is None else torch.add(base, update, out=update)
                rows, columns = (part.tiles(part.of(hash.expand(out.shape))) for hash in hashes)
                field = torch.mul(rows, columns, out=bits[: total.numel()].view(total.shape))
                # fp16's subnormal numbers have a coarser grid than the dither leaves.
                target.copy_(dither_(total.to(torch.float32), block.dtype, field).to(block.dtype))
            elif base is None or out.dtype != block.dtype:
                total = update if base is None else torch.add(base, update, out=update)
                target.copy_(total.to(block.dtype))
            else:
                torch.add(base, update, out=target)

    def factor_gradients(
        self, h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, settings: Settings
    ) -> None:
        rows = shares(h.shape[0], TILE, worker_count(h.device), block.row0 % TILE)
        settings = settings._replace(workspace=settings.workspace // len(rows))
        # Of A and C every share but the first sums its own part.
        own = [gradients, *(gradients.apart() for _ in rows[1:])]
        run(
            [
                partial(self._contribute, h[a:b], block.rows(a, b), estimator, targets.rows(a, b), settings)
                for (a, b), targets in zip(rows, own, strict=True)
            ],
            h.device,
        )
        for part in own[1:]:
            gradients.add(part)

    def _contribute(
        self, h: torch.Tensor, block: Block, estimator: Estimator, gradients: ParameterGradients, settings: Settings
    ) -> None:
        factors, drawn = block.factors, block.drawn
        products = RankProducts(factors if drawn is None else factors._replace(A=drawn.A, C=drawn.C), block.origin)
        dtype = accumulation_dtype(torch.promote_types(h.dtype, products.dtype))
        wide = block.factors.to(dtype)  # fp64 inputs with fp32 factors: P and Q stay fp32, as everywhere
        most, p_scratch, q_scratch = self._scratch(h, block, products.dtype, settings)
        grad_scratch = h.new_empty(p_scratch.numel() if gradients.direction_wanted else 0, dtype=dtype)
        for rows, columns, arrange, (p, q) in _pieces(block, products, most, p_scratch, q_scratch):
            near = wide.rows(rows.start, rows.stop).columns(columns.start, columns.stop)
            weights = None if drawn is None else drawn.sample.weights[columns]
            grads = gradients.rows(rows.start, rows.stop).columns(columns.start, columns.stop)
            scaled = h[rows, columns].to(dtype).mul_(block.factors.scale)
            p.relu_()
            if gradients.direction_wanted:
                grad_q = grad_scratch[: scaled.numel()].view(scaled.shape)
                torch.mul(arrange(scaled), p, out=arrange(grad_q))
                _estimate_(arrange(grad_q), q, estimator)
                _contract(grad_q, near.D, near.C, grads.D, grads.C, weights)
            if gradients.magnitude_wanted:
                arrange(scaled).mul_(_sign_(q).mul_(p.gt_(0)))
                _contract(scaled, near.B, near.A, grads.B, grads.A, weights)

    def _scratch(
        self, like: torch.Tensor, block: Block, dtype: torch.dtype, settings: Settings
    ) -> tuple[int, torch.Tensor, torch.Tensor]:
        """How many tiles of a block may be taken at a time, and room for P and Q of as many, on `like`'s device."""
        most = max(1, self.weight_temporaries(settings.workspace) // (_BUFFERS * TILE * TILE * dtype.itemsize))
        shape = like.shape if block.drawn is None else torch.Size((like.shape[0], block.drawn.A.shape[1]))
        tiles = min(most, tile_count(block.origin, shape))
        p, q = (like.new_empty(tiles * TILE * TILE, dtype=dtype) for _ in range(2))
        return most, p, q


_Piece = tuple[slice, slice, Callable[[torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _pieces(block: Block, products: RankProducts, most: int, p: torch.Tensor, q: torch.Tensor) -> Iterator[_Piece]:
    """(rows, columns, a view of them in P's order, (P, Q)) of the pieces of a block, of at most `most` tiles each."""
    (rows, columns), drawn = block.shape, block.drawn
    if drawn is None:
        for part in parts(block.origin, torch.Size((rows, columns)), most):
            yield part.rows.lines, part.columns.lines, part.tiles, products.write(part, p, q)
        return
    groups = list(drawn_groups(drawn.sample.columns, block.col0, most))
    for row_span in spans(block.row0, rows, 1):
        for own, tiles, places in groups:
            yield row_span.lines, own, _as_it_is, products.write_drawn(Part(row_span, tiles), places, p, q)


def _as_it_is(lines: torch.Tensor) -> torch.Tensor:
    return lines


def _update_(p: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """ΔW = max(P, 0) · ±s, with one rounding, in P's memory."""
    return p.relu_().mul_(_sign_(q, scale))


def _estimate_(grad_sign: torch.Tensor, q: torch.Tensor, estimator: Estimator) -> None:
    """`reference.estimator_gradient` in place."""
    if estimator.kind == "clip":
        grad_sign.clamp_(-estimator.bound, estimator.bound)
    elif estimator.kind == "xnor":
        grad_sign.masked_fill_((q.abs() <= 1).logical_not_(), 0)


def _sign_(q: torch.Tensor, magnitude: torch.Tensor | float = 1.0) -> torch.Tensor:
    """±`magnitude` by the sign of q, in place: exactly 2m − m or 0 − m. Faster than torch.where or copysign."""
    return q.gt_(0).mul_(2 * magnitude).sub_(magnitude)


def _contract(
    grad: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    grad_up: torch.Tensor | None,
    grad_down: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> None:
    """Gradients of a product up [n, r] @ down [r, k] from the product's gradient [n, k], added where wanted.

    With `weights` [k], columns count as `Drawn` says.
    """
    if grad_up is not None:
        grad_up.addmm_(grad, (down if weights is None else down * weights).t())
    if grad_down is not None:
        grad_down.addmm_(up.t(), grad)
