"""Reports for the tests of the page: a plausible one of any depth, and any that could be."""

from __future__ import annotations

import math
import random

from hypothesis import strategies as st

from dual_lora_kernels.inspection.report import (
    AdapterReport,
    AgainstBase,
    LayerReport,
    Magnitudes,
    Similarity,
    Spectrum,
)

LLAMA = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def llama_report(
    depth: int = 32, *, base: bool = True, spectra: bool = True, compared: tuple[str, ...] = ()
) -> AdapterReport:
    """An adapter of a Llama of 8B's shapes, with figures as trained adapters have them."""
    chance = random.Random(0)
    layers = [
        _layer(chance, index, depth, kind, shape, base, spectra, compared)
        for index in range(depth)
        for kind, shape in LLAMA.items()
    ]
    return AdapterReport(
        adapter="llama-3-8b-metamath",
        base="Meta-Llama-3-8B" if base else None,
        compared=compared,
        adapter_bytes=4 * sum(layer.parameters for layer in layers),
        layers=tuple(layers),
        modules_to_save=(),
        version="0.9.0",
        backend="native",
    )


def _layer(
    chance: random.Random,
    index: int,
    depth: int,
    kind: str,
    shape: tuple[int, int],
    base: bool,
    spectra: bool,
    compared: tuple[str, ...],
) -> LayerReport:
    place = list(LLAMA).index(kind)
    wave = math.sin(index / depth * math.pi + place)
    frozen = 0.5 + 0.03 * wave + chance.gauss(0, 0.004)
    relative = 0.004 * math.exp(0.5 * wave + 0.25 * place * index / depth + chance.gauss(0, 0.06))
    rms = relative * 0.02
    counts = [
        int(math.prod(shape) * (1 - frozen) / 5.5 * 2 ** min(0, i - 16) * (1 if i < 19 else math.exp(-(2 ** (i - 19)))))
        for i in range(24)
    ]
    largest_rank = min(shape)
    return LayerReport(
        name=f"model.layers.{index}.{kind}",
        depth=index,
        kind=kind,
        shape=shape,
        r1=16,
        r2=16,
        alpha=32.0,
        scale=2.0,
        parameters=32 * sum(shape),
        frozen=frozen,
        negative=0.5 + chance.gauss(0, 0.003) - 0.006 * wave,
        norm=rms * math.sqrt(math.prod(shape)),
        magnitudes=Magnitudes(rms, 7 * rms, math.floor(math.log2(rms)) - 17, tuple(counts)),
        base=AgainstBase("bfloat16", relative, min(1.0, 0.62 - 0.12 * wave + chance.gauss(0, 0.01))) if base else None,
        update=_spectrum(chance, largest_rank, 0.97, 40 + 20 * wave, 0.55) if spectra else None,
        magnitude=_spectrum(chance, largest_rank, 0.9, 8 + 2 * wave, 0.9) if spectra else None,
        direction=_spectrum(chance, largest_rank, 0.995, 60, 0.4) if spectra else None,
        similarities=tuple(
            Similarity(other, 0.3 + 0.2 * wave, 0.6 + 0.05 * wave, 0.3 + 0.02 * wave) for other in compared
        ),
    )


def _spectrum(chance: random.Random, largest: int, share: float, stable: float, energy: float) -> Spectrum:
    energy += chance.gauss(0, 0.01)
    is_exact = largest <= 1024
    rank = int(largest * (share + chance.uniform(-0.03, 0.005))) if is_exact else 1024
    positions = sorted({round(largest ** (i / 40)) for i in range(41) if round(largest ** (i / 40)) <= rank})
    values = tuple(
        position**-0.35 * (1 - 0.999 * position / (rank + 1)) / (1 - 0.999 / (rank + 1)) for position in positions
    )
    return Spectrum(rank, is_exact, largest, stable * chance.uniform(0.9, 1.1), energy, tuple(positions), values)


HOSTILE = (
    "<script>document.title='hostile'</script>",
    "\"><img src=x onerror=document.title='hostile'>",
    "' onmouseover='document.title=1",
    "</title></style></svg><b>",
    "<!--",
    "]]>",
    "&lt;&amp;&#0;",
    "\x00\x1b\ud800\ufffe",
    "a\u202eb",
    "x" * 400,
)
"""Names that would change the page if they were taken for HTML, or that no page may hold as they are."""

_names = st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=20)
_shares = st.floats(0, 1) | st.sampled_from([0.0, 1.0])
_amounts = st.floats(0) | st.sampled_from([0.0, 1.0, math.inf, math.nan])


@st.composite
def _layers(draw: st.DrawFn, compared: tuple[str, ...]) -> LayerReport:
    shape = draw(st.tuples(st.integers(1, 20000), st.integers(1, 20000)))
    kind = draw(_names)
    depth = draw(st.none() | st.integers(0, 40) | st.sampled_from([0, 10**30]))
    counts = draw(st.lists(st.integers(0, 2**40), max_size=30))
    base = st.builds(AgainstBase, st.sampled_from(["bfloat16", "float32"]), _amounts, _shares)
    spectrum = st.none() | _spectra(min(shape))
    beside = [
        draw(st.builds(Similarity, st.just(other), st.floats(-1, 1) | st.just(math.nan), _shares, _shares))
        for other in compared
    ]
    return LayerReport(
        name=kind if depth is None else f"layers.{depth}.{kind}",
        depth=depth,
        kind=kind,
        shape=shape,
        r1=draw(st.integers(1, 512)),
        r2=draw(st.integers(1, 512)),
        alpha=draw(st.floats(-1e6, 1e6)),
        scale=draw(st.floats(-1e6, 1e6)),
        parameters=draw(st.integers(1, 10**12)),
        frozen=draw(_shares),
        negative=draw(_shares),
        norm=draw(_amounts),
        magnitudes=Magnitudes(draw(_amounts), draw(_amounts), draw(st.integers(-149, 100)), tuple(counts)),
        base=draw(st.none() | base),
        update=draw(spectrum),
        magnitude=draw(spectrum),
        direction=draw(spectrum),
        similarities=tuple(beside[: draw(st.integers(0, len(beside)))]),
    )


@st.composite
def _spectra(draw: st.DrawFn, largest: int) -> Spectrum:
    positions = sorted(draw(st.sets(st.integers(1, largest), max_size=5)))
    values = sorted((draw(_shares) for _ in positions), reverse=True)
    return Spectrum(
        rank=draw(st.integers(0, largest)),
        is_exact=draw(st.booleans()),
        largest_rank=largest,
        stable_rank=draw(st.floats(1, largest) | st.just(math.nan)),
        energy=draw(_shares | st.just(math.nan)),
        positions=tuple(positions),
        values=tuple(values),
    )


@st.composite
def adapter_reports(draw: st.DrawFn) -> AdapterReport:
    """Any report: hostile names, missing parts, zeros, figures that are no numbers, layers without a depth."""
    compared = tuple(draw(st.lists(_names, max_size=2, unique=True)))
    return AdapterReport(
        adapter=draw(_names),
        base=draw(st.none() | _names),
        compared=compared,
        adapter_bytes=draw(st.integers(0, 10**13)),
        layers=tuple(draw(st.lists(_layers(compared), max_size=6))),
        modules_to_save=tuple(draw(st.lists(_names, max_size=2))),
        version=draw(_names),
        backend=draw(_names),
    )
