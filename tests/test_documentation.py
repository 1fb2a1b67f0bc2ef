"""What README and docs/ say can be typed: examples run, commands parse, links lead somewhere, names exist."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import dual_lora_kernels.distributed
import dual_lora_kernels.peft
import dual_lora_kernels.trainer

from . import documentation_names, documentation_spread
from .documents import PAGES, ROOT, Command, anchors, commands, examples, links, named_in_code, words_of
from .processes import Processes
from .typed_commands import problem

HOSTS = {"arxiv.org", "github.com"}
"""What pages link to outside; no link can be followed here, so a new one is looked at by who adds it."""
FOLDERS = ("tests", "benchmarks", "examples", "docs", "csrc", "dual_lora_kernels")
SPREAD = "docs/distributed.md"
WITH_EXAMPLES = [page for page in PAGES if examples(page) and page != SPREAD]


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, so that imports stay; each with a model of its own."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples(page):
        names |= documentation_names.names(example.code)
        example.run(names)


@pytest.mark.parametrize("number", range(len(examples(SPREAD))))
def test_examples_run_on_two_processes(
    number: int, two: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    documentation_names.checkpoint()
    two.run(documentation_spread.run_in, tmp_path, examples(SPREAD)[number])


def test_examples_are_found() -> None:
    """A fence in another spelling would run nowhere."""
    fences = sum((ROOT / page).read_text(encoding="utf-8").lower().count("```py") for page in PAGES)
    assert fences == sum(len(examples(page)) for page in PAGES) >= 18


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_typed(page: str) -> None:
    found = [(command.words, what) for command in commands(page) if (what := problem(command))]
    assert found == []


@pytest.mark.parametrize(
    ("typed", "wrong"),
    [
        ("dual-lora merg BASE ADAPTER OUT", "no subcommand merg"),
        ("dual-lora merge BASE", "the following arguments are required"),
        ("dual-lora inspect ADAPTER --htlm page.html", "unrecognized arguments: --htlm"),
        (".venv/bin/dual-lora bench layer --quik", "unrecognized arguments: --quik"),
        ("python -m benchmarks layers", "no preset layers"),
        ("python -m benchmarks.layers.no_such_table", "no module benchmarks.layers.no_such_table"),
        ("torchrun --nproc-per-node 2 -m examples.distributed.finetune --lay fsdp", "no option --lay"),
        ("OMP_NUM_THREADS=1 make no-such-target", "make has no no-such-target"),
        ('pip install --no-build-isolation ".[peft,pefft]"  # both', "no extra pefft"),
        ("pytest tests/test_no_such.py", "no tests/test_no_such.py"),
    ],
)
def test_what_cannot_be_typed_is_seen(typed: str, wrong: str) -> None:
    found = problem(Command("page", words_of(typed), True))
    assert found is not None
    assert wrong in found


def test_anchors_are_githubs(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("# A *b*, `c_d`: e–f\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n", encoding="utf-8")
    assert anchors(file) == {"a-b-c_d-ef", "same", "same-1"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links(page):
        parts = urlsplit(link.target)
        if parts.scheme or parts.netloc:
            assert parts.scheme == "https", link
            assert parts.hostname in HOSTS, link
            assert re.fullmatch(r"[\w./#-]+", parts.path), link
            continue
        file = ((ROOT / page).parent / parts.path).resolve() if parts.path else ROOT / page
        assert file.exists(), link
        assert file.is_relative_to(ROOT), link
        if parts.fragment:
            assert parts.fragment in anchors(file), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    for name in named_in_code(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./]+", name):
            assert (ROOT / name).exists(), name


def test_concepts_name_functions_that_exist() -> None:
    """Its last table: a file, a colon, names in it."""
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    table = text.split("## Where each lives")[1]
    found = re.findall(r"`([\w/]+\.(?:py|h))`(?:: (`[\w.]+`(?:, `[\w.]+`)*))?", table)
    assert len(found) >= 18
    for name, functions in found:
        places = [ROOT / "dual_lora_kernels" / name, ROOT / name, ROOT / "dual_lora_kernels/backends/triton" / name]
        source = next(place for place in places if place.exists()).read_text(encoding="utf-8")
        for function in re.findall(r"[\w.]+", functions):
            for part in function.split("."):
                assert re.search(rf"(def|class|inline \S+|inline ProductGradients<V>) {part}\b", source), (name, part)


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("python", dual_lora_kernels),
        ("peft", dual_lora_kernels.peft),
        ("distributed", dual_lora_kernels.distributed),
        ("trainer", dual_lora_kernels.trainer),
    ],
)
def test_the_reference_has_every_public_name(page: str, module: object) -> None:
    text = (ROOT / f"docs/reference/{page}.md").read_text(encoding="utf-8")
    identifiers = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    for identifier in identifiers:
        owner, _, name = identifier.rpartition(".")
        assert getattr(importlib.import_module(owner), name) is getattr(module, name)
    public = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == "dual_lora_kernels.trainer"
    ]
    assert sorted(identifier.rpartition(".")[2] for identifier in identifiers) == sorted(public)


def test_the_citation_has_this_version() -> None:
    version = dual_lora_kernels.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"Version {version}, Apache-2.0" in (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
