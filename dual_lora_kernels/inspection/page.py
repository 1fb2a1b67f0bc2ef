"""An inspected adapter as one HTML page that needs nothing else: no script, no font, no picture, no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files

from .charts import shapes
from .layer_charts import ranks, signs, similarities, sizes
from .layer_table import layer_table
from .markup import Markup, breakable, element, joined
from .numerals import finite, is_bound, median, number, percentage, size, tied
from .report import AdapterReport, LayerReport


def render_page(report: AdapterReport) -> str:
    """The page of `report`: a header, headline figures, charts by depth and a table of all layers.

    The same report gives the same text. Names are escaped, and the page's policy lets a browser load nothing and run
    nothing, whatever they hold.
    """
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{report.adapter} · Dual LoRA adapter"),
        element("style", Markup(style)),
    )
    body = element("body", shapes(), _header(report), element("main", *_sections(report)), _footer(report))
    return joined(Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), Markup("\n"))


def _header(report: AdapterReport) -> Markup:
    layers = report.layers
    facts: dict[str, str] = {
        "Base model": "not given" if report.base is None else breakable(report.base),
        "Adapted layers": f"{len(layers):,}",
        "Ranks": _ranks(layers),
        "Parameters": f"{sum(layer.parameters for layer in layers):,}",
        "Size": size(report.adapter_bytes),
    }
    if report.modules_to_save:
        facts["Saved whole"] = _names(report.modules_to_save)
    if report.compared:
        facts["Compared with"] = _names(report.compared)
    listed = [element("div", element("dt", term), element("dd", fact)) for term, fact in facts.items()]
    return element(
        "header",
        element("p", "Dual LoRA adapter", class_="eyebrow"),
        element("h1", breakable(report.adapter)),
        element(
            "p",
            tied(
                "To every adapted weight W0 the adapter adds ΔW = s · ReLU(BA) ⊙ Sign(DC). P = BA says how far a weight"
                " moves, and Q = DC says which way."
            ),
            class_="lead",
        ),
        element("dl", *listed, class_="facts"),
    )


def _sections(report: AdapterReport) -> Iterable[Markup]:
    if not report.layers:
        yield element("p", "This adapter has no Dual LoRA layers.", class_="lead")
        return
    yield element(
        "section",
        element("h2", "At a glance", id="glance"),
        element("p", "Medians over the layers, with the smallest and the largest layer's figure below.", class_="lead"),
        _headlines(report.layers),
        aria_labelledby="glance",
    )
    without_base = "" if report.base else " No base model was given, so nothing is known about W0 beside it."
    yield from _charts("size", "How large the update is", f"Each point is a layer.{without_base}", sizes(report))
    yield from _charts(
        "signs", "Which weights move, and which way", "P ≤ 0 holds a weight still, Q's sign turns it.", signs(report)
    )
    yield from _charts(
        "ranks",
        "How many directions it has",
        "LoRA's update has at most its rank. ReLU and Sign act on every entry, so Dual LoRA's can have many more.",
        ranks(report),
    )
    for index, adapter in enumerate(report.compared):
        yield from _charts(
            f"beside{index}",
            joined("Beside ", breakable(adapter)),
            "The layers that both adapters have.",
            similarities(report, adapter),
        )
    yield element(
        "section",
        element("h2", "All layers", id="layers"),
        element("p", "Every figure of every layer; the table scrolls within its frame.", class_="lead"),
        layer_table(report, "layers"),
        aria_labelledby="layers",
    )


def _charts(name: str, heading: str, lead: str, charts: Sequence[Markup]) -> Iterable[Markup]:
    """A section of charts; none without any."""
    if charts:
        yield element(
            "section",
            element("h2", heading, id=name),
            element("p", tied(lead), class_="lead"),
            element("div", *charts, class_="charts"),
            aria_labelledby=name,
        )


def _headlines(layers: Sequence[LayerReport]) -> Markup:
    frozen = [layer.frozen for layer in layers]
    negative = [layer.negative for layer in layers]
    found = [
        _headline(
            "Frozen",
            f"{percentage(median(frozen))} %",
            "of a layer's entries have P ≤ 0: no update, no gradient.",
            _from_to(frozen),
        ),
        _headline(
            "Negative signs",
            f"{percentage(median(negative))} %",
            "of the signs are −1. At half, as many weights go down as up.",
            _from_to(negative),
        ),
    ]
    bases = [layer.base for layer in layers if layer.base]
    if bases:
        norms = finite(base.relative_norm for base in bases)
        away = [base.rounded_away for base in bases]
        found += [
            _headline(
                "Size beside W0",
                number(median(norms)),
                "is ‖ΔW‖ / ‖W0‖, the update's size beside the weight's.",
                f"{number(min(norms))} to {number(max(norms))}" if norms else "",
            ),
            _headline(
                "Lost by rounding",
                f"{percentage(median(away))} %",
                "of non-zero updates are below half a step of W0's dtype: rounding to nearest would delete them.",
                _from_to(away),
            ),
        ]
    spectra = [layer.update for layer in layers if layer.update]
    if spectra:
        middle = median(spectrum.rank for spectrum in spectra)
        share = median(spectrum.rank / spectrum.largest_rank for spectrum in spectra)
        least = "≥ " if any(map(is_bound, spectra)) else ""
        sums = sorted({layer.r1 + layer.r2 for layer in layers if layer.update})
        held = f"{sums[0]:,}" if len(sums) == 1 else f"{sums[0]:,} to {sums[-1]:,}"
        found.append(
            _headline(
                "Rank of the update",
                f"{least}{middle:,.0f}",
                f"is the numerical rank of ΔW. LoRA of as many parameters is held to {held}.",
                f"median {least}{percentage(share)} % of the largest possible",
            )
        )
    return element("ul", *found, class_="headlines")


def _headline(label: str, value: str, meaning: str, spread: str) -> Markup:
    return element(
        "li",
        element("p", label, class_="label"),
        element("p", tied(value), class_="value"),
        element("p", tied(meaning)),
        *([element("p", tied(spread), class_="spread")] if spread else []),
    )


def _from_to(shares: Iterable[float]) -> str:
    known = finite(shares)
    return f"{percentage(min(known))} % to {percentage(max(known))} %" if known else ""


def _ranks(layers: Sequence[LayerReport]) -> str:
    pairs = list(dict.fromkeys((layer.r1, layer.r2) for layer in layers))
    shown = [f"r1 = {r1:,}, r2 = {r2:,}" for r1, r2 in pairs[:2]]
    return "; ".join([*shown, f"{len(pairs) - 2:,} more pairs"] if len(pairs) > 2 else shown) or "none"


def _names(names: Sequence[str]) -> Markup:
    first, *others = map(breakable, names)
    return joined(first, *(part for name in others for part in (", ", name)))


def _footer(report: AdapterReport) -> Markup:
    return element(
        "footer",
        element(
            "p",
            tied(
                "The numerical rank counts the singular values above max(N, K) · ε · σ₁, with fp32's ε. LoRA of as many"
                " parameters has the rank r1 + r2."
            ),
        ),
        element("p", f"Made by dual_lora_kernels {report.version}; ΔW by its {report.backend} backend."),
    )
