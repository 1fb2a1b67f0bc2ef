"""What an inspection finds, as values: the table, the JSON and the page are made of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix [N, K] of a layer.

    Attributes:
        rank: numerical rank, singular values above max(N, K) · ε(fp32) · σ₁; a lower bound unless `is_exact`.
        is_exact: the rank is known: all singular values were computed, or a randomised SVD found fewer above the
            tolerance than it looked for.
        largest_rank: min(N, K).
        stable_rank: ‖·‖²_F / σ₁².
        energy: share of ‖·‖²_F in the largest r1 + r2 singular values, which is all that LoRA of as many parameters
            could hold; 1 of a zero matrix.
        positions, values: some singular values as shares of σ₁, in falling order, and their places from 1; none of a
            zero matrix.
    """

    rank: int
    is_exact: bool
    largest_rank: int
    stable_rank: float
    energy: float
    positions: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Magnitudes:
    """The distribution of |ΔW| over the entries that are not zero.

    Attributes:
        rms: over all entries, zeros included.
        largest: max |ΔW|.
        first_exponent, counts: counts[i] entries have 2^(first_exponent + i) ≤ |ΔW| < 2^(first_exponent + i + 1), but
            that subnormal numbers all count at the exponent below the least normal one's.
    """

    rms: float
    largest: float
    first_exponent: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class AgainstBase:
    """ΔW beside the base weight W0.

    Attributes:
        dtype: of W0 as it is stored ("bfloat16", say).
        relative_norm: ‖ΔW‖_F / ‖W0‖_F; infinite where W0 alone is zero.
        rounded_away: share of the non-zero updates below half an ulp of W0 in its dtype: what rounding W0 + ΔW to
            nearest would have deleted; 0 where there are none.
    """

    dtype: str
    relative_norm: float
    rounded_away: float


@dataclass(frozen=True)
class Similarity:
    """This layer's update beside the same layer's of another adapter.

    Attributes:
        adapter: the other's name, one of `AdapterReport.compared`.
        cosine: ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖); 0 where one is zero.
        equal_signs: share of all entries where Sign(DC) is the same in both.
        both_active: share of all entries where P > 0 in both.
    """

    adapter: str
    cosine: float
    equal_signs: float
    both_active: float


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    Attributes:
        name: the layer's full name in the model.
        depth: the first number in the name ("model.layers.7.mlp.up_proj": 7); None without one.
        kind: the name after that number ("mlp.up_proj"), or the whole name.
        shape: (out_features, in_features) = (N, K).
        r1, r2, alpha, scale: as saved; scale is the s that ΔW is computed with.
        parameters: numbers in the four factors.
        frozen: share of entries with P ≤ 0, whose update is zero and whose gradients are.
        negative: share of entries with Sign(DC) = −1.
        norm: ‖ΔW‖_F.
        magnitudes: |ΔW|.
        base: None where no base model was given.
        update, magnitude, direction: spectra of ΔW, of W_m = ReLU(BA) and of W_d = Sign(DC); None where not wanted.
        similarities: one for each compared adapter that has this layer.
    """

    name: str
    depth: int | None
    kind: str
    shape: tuple[int, int]
    r1: int
    r2: int
    alpha: float
    scale: float
    parameters: int
    frozen: float
    negative: float
    norm: float
    magnitudes: Magnitudes
    base: AgainstBase | None
    update: Spectrum | None
    magnitude: Spectrum | None
    direction: Spectrum | None
    similarities: tuple[Similarity, ...] = ()


@dataclass(frozen=True)
class AdapterReport:
    """One inspected adapter.

    Attributes:
        adapter, base, compared: names (last parts of paths, not paths, so that a report can be published).
        adapter_bytes: size of its weights' file.
        layers: by depth, and in the adapter's order where that is the same; those without one come last.
        modules_to_save: modules that the adapter holds whole.
        version: of this package.
        backend: which computed ΔW.
    """

    adapter: str
    base: str | None
    compared: tuple[str, ...]
    adapter_bytes: int
    layers: tuple[LayerReport, ...]
    modules_to_save: tuple[str, ...]
    version: str
    backend: str
