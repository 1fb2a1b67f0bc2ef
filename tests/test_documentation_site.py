"""The built site: it needs no network, nothing in it is broken, and it has what it promises."""

from __future__ import annotations

import importlib.util
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import dual_lora_kernels
from dual_lora_kernels import cli

from . import documentation_site


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        """Of its own accord: scripts, styles, pictures."""
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documentation_site.build(tmp_path_factory)


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    """By name; the page of the server that does not find one aside, which does not know where it is."""
    files = (file for file in site.rglob("*.html") if file.name != "404.html")
    return {file.relative_to(site).as_posix(): Page(file.read_text(encoding="utf-8")) for file in files}


def test_every_page_is_there(site: Path, pages: dict[str, Page]) -> None:
    written = {
        path.relative_to(documentation_site.ROOT / "docs").with_suffix(".html").as_posix()
        for path in (documentation_site.ROOT / "docs").rglob("*.md")
    }
    results = {
        "results/" + path.relative_to(documentation_site.ROOT / "benchmarks/results").with_suffix(".html").as_posix()
        for path in (documentation_site.ROOT / "benchmarks/results").rglob("*.md")
    }
    assert set(pages) == written | results | {"changelog.html", "contributing.html"}
    assert not (site / "hooks").exists()


def test_links_within_the_site_lead_somewhere(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for target in page.links + page.loads:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            assert not parts.path.startswith("/"), (name, target)
            there = posixpath.normpath(posixpath.join(posixpath.dirname(name), parts.path)) if parts.path else name
            assert (site / there).is_file(), (name, target)
            if there in pages:
                assert unquote(parts.fragment) in pages[there].anchors, (name, target)


def test_nothing_is_loaded_from_a_network(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert not [target for target in page.loads if urlsplit(target).netloc], name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_equations_are_mathml(site: Path) -> None:
    concepts = (site / "concepts.html").read_text(encoding="utf-8")
    source = (documentation_site.ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    fences = source.count("```math")
    assert concepts.count('display="block"') == fences >= 5
    inline = re.findall(r"\$[^$\n]+\$", re.sub(r"```math.*?```", "", source, flags=re.DOTALL))
    assert concepts.count('display="inline"') == len(inline)
    for page in site.rglob("*.html"):
        assert not re.search(r'class="arithmatex">\\', page.read_text(encoding="utf-8")), page


def test_the_reference_has_the_docstrings(site: Path, pages: dict[str, Page]) -> None:
    """By the objects' own names, so that docstrings and signatures can be found by other sites as well."""
    text = (site / "reference/python.html").read_text(encoding="utf-8")
    for name in dual_lora_kernels.__all__:
        anchors = {f"dual_lora_kernels.{name}", f"dual_lora_kernels.model.{name}"}
        assert anchors & pages["reference/python.html"].anchors, name
        first_word = re.search(r"\w{4,}", getattr(dual_lora_kernels, name).__doc__)
        assert first_word
        assert first_word[0] in text
    assert "::" not in re.sub(r"<[^>]+>", "", text)


def test_the_reference_has_every_command(
    site: Path, pages: dict[str, Page], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) >= 6
    assert {f"dual-lora-{command}" for command in commands} <= pages["reference/command_line.html"].anchors


@pytest.mark.parametrize(
    ("page", "markdown", "wanted"),
    [
        ("peft.md", "[`x`\ny](../benchmarks/results/dither_table.md)", "[`x`\ny](results/dither_table.md)"),
        ("reference/peft.md", "[x](../peft.md#verbs)", "[x](../peft.md#verbs)"),
        ("contributing.md", "[x](docs/architecture.md)", "[x](architecture.md)"),
        ("index.md", "[x](../CHANGELOG.md)", "[x](changelog.md)"),
        ("numerics.md", "[`x.py`](../dual_lora_kernels/reference.py)", "`x.py`"),
        ("demo.md", "[options](../examples/demo/README.md)", "options (`examples/demo/README.md`)"),
        ("index.md", "![x](images/bench_layer.svg)", "![x](images/bench_layer.svg)"),
        ("index.md", "[x](https://arxiv.org/abs/1)", "[x](https://arxiv.org/abs/1)"),
        ("index.md", "`[x](../Makefile)` and ``a[`](../Makefile)``", None),
        ("index.md", "```\n[x](../Makefile)\n```\n", None),
        ("index.md", "[x](../no_such_file.md)", None),
    ],
)
def test_links_are_rewritten(page: str, markdown: str, wanted: str | None) -> None:
    """None: as it was; MkDocs says where that is broken."""
    spec = importlib.util.spec_from_file_location("repository", documentation_site.ROOT / "docs/hooks/repository.py")
    assert spec
    assert spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert hook.rewritten(markdown, page) == (wanted or markdown)


def test_what_the_site_does_not_have_is_text(site: Path) -> None:
    """A link to a source file of the repository."""
    numerics = re.sub(r"<[^>]+>", "", (site / "numerics.html").read_text(encoding="utf-8"))
    assert "dual_lora_kernels/reference.py" in numerics
    assert ".py)" not in numerics
