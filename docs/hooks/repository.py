"""Links to files of the repository work in the site as they do on GitHub.

Pages say ``../benchmarks/results/x.md`` and ``../CHANGELOG.md``. The site has the measured results, with their
pictures, and what lies at the repository's root as pages of its own; what it does not have (sources, scripts, JSON)
becomes text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the root and the pages that they are in the site; the README is what the start page replaces."""

# Code comes first, so that what looks like a link in it stays as it is; a link's text may have code in it.
_CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+).*?^(?P=fence)|(?P<bang>!?)\[(?P<text>(?:`[^`]*`|!\[[^\]]*\]\([^)]*\)|[^\]`])*)\]\((?P<target>[^)\s]+)\)|(`+).+?\5",
    re.DOTALL | re.MULTILINE,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' event: pages that are not in docs/ are added."""
    added = {name: page for name, page in PAGES.items() if name != "README.md"}
    for path in sorted((ROOT / RESULTS).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        page = site_path(name)
        if page and path.is_file():
            added[name] = page
    for name, page in added.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """MkDocs' event: links go to the site's pages. What was measured is found through the pages that speak of it."""
    if page.file.src_uri.startswith("results/"):
        page.meta["search"] = {"exclude": True}
    return rewritten(markdown, page.file.src_uri)


def site_path(name: str) -> str | None:
    """Where the site has the repository's file `name`; None where it has it nowhere."""
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name.startswith(RESULTS + "/") and name.endswith((".md", ".png", ".svg")):
        return "results/" + name.removeprefix(RESULTS + "/")
    return PAGES.get(name)


def repository_path(page: str) -> str:
    """The repository's file that the site has as `page`."""
    for name, of_it in PAGES.items():
        if page == of_it and name != "README.md":
            return name
    if page.startswith("results/"):
        return f"{RESULTS}/{page.removeprefix('results/')}"
    return f"docs/{page}"


def rewritten(markdown: str, page: str) -> str:
    """`markdown`, of the site's `page`, with links that hold in the site."""
    source = posixpath.dirname(repository_path(page))

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None or target.startswith("#") or "://" in target:
            return found[0]
        path, hash_, anchor = target.partition("#")
        name = posixpath.normpath(posixpath.join(source, path))
        there = site_path(name)
        if there is not None:
            relative = posixpath.relpath(there, posixpath.dirname(page) or ".")
            return f"{found['bang']}[{rewritten(found['text'], page)}]({relative}{hash_}{anchor})"
        if (ROOT / name).exists():
            text: str = found["text"]
            return text if "`" in text else f"{text} (`{name}`)"
        return found[0]  # MkDocs says that it is broken

    return _CODE_OR_LINK.sub(link, markdown)
