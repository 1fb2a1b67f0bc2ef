"""What the documents show is what the committed results give, and every way in which it could be otherwise is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from benchmarks.harness.report import RESULTS
from benchmarks.harness.results import MACHINES, Case, Measurement, Results, read, write
from benchmarks.publish import __main__ as publishing
from benchmarks.publish import blocks, layers, models, ranks, shown
from benchmarks.publish.pictures import Picture

DOCUMENTS = sorted(MACHINES.glob("*/*.json"))
SCHEMA = json.loads((RESULTS / "schema.json").read_text(encoding="utf-8"))

NAMES = st.from_regex(r"[a-z0-9]{1,6}(-[a-z0-9]{1,6}){0,2}", fullmatch=True)
# Not markers: no line that begins with a comment. A block's own text may be anything else.
TEXTS = st.lists(st.from_regex(r"([^\n<\r][^\n\r]{0,20})?", fullmatch=True), max_size=4).map("\n".join)


def test_documents_and_pictures_are_what_the_results_give() -> None:
    assert publishing.publish(publishing.ROOT, publishing.sources(), check=True) == []


# Results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_results_are_as_the_schema_says(path: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker()).validate(
        json.loads(path.read_text(encoding="utf-8"))
    )
    results = read(path)
    assert results.machine == path.parent.name
    for case in results.cases:
        assert case.reference in case.timed()
        rounds = {len(case.subjects[name].seconds) for name in case.timed()}
        assert len(rounds) == 1, "subjects of one case are timed in the same rounds"
        for name, measurement in case.subjects.items():
            assert name in shown.LABELS
            assert bool(measurement.seconds) != bool(measurement.left_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["cases"][0]["subjects"]["lora"].update(seconds=[0.1, 0.0]), "0.0 is less than or equal"),
        (lambda found: found["cases"][0]["subjects"]["lora"].pop("left_out"), "'left_out' is a required property"),
        (lambda found: found["environment"].pop("commit"), "'commit' is a required property"),
        (lambda found: found.update(preset="layers"), "'layers' is not one of"),
        (lambda found: found.update(medians=[]), "Additional properties"),
    ],
)
def test_the_schema_refuses(change: Any, message: str, tmp_path: Path) -> None:
    found = json.loads(write(_results(), "layer", tmp_path).read_text(encoding="utf-8"))
    jsonschema.validate(found, SCHEMA)
    change(found)
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(found, SCHEMA)


# Blocks -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(TEXTS, NAMES, TEXTS), max_size=4), TEXTS, st.data())
def test_blocks_are_found_and_filled(parts: list[tuple[str, str, str]], end: str, data: st.DataObject) -> None:
    text = "".join(f"{before}\n<!-- table: {name} -->\n{old}\n<!-- /table -->\n" for before, name, old in parts) + end
    found = blocks.find(text, "page.md")
    assert [block.name for block in found] == [name for _, name, _ in parts]
    lines = text.split("\n")
    for block, (_, name, old) in zip(found, parts, strict=True):
        assert lines[block.first - 1] == f"<!-- table: {name} -->"
        assert lines[block.last - 1] == "<!-- /table -->"
        assert blocks.content(text, block) == old.strip("\n")
    contents = {name: data.draw(TEXTS, label=name) for _, name, _ in parts}
    filled = blocks.fill(text, found, contents)
    again = blocks.find(filled, "page.md")
    assert [blocks.content(filled, block) for block in again] == [contents[name].strip("\n") for _, name, _ in parts]
    assert blocks.fill(filled, again, contents) == filled
    assert _outside(filled, again) == _outside(text, found)


def _outside(text: str, found: list[blocks.Block]) -> list[str]:
    """The lines that are in no block."""
    lines = text.split("\n")
    inside = {number for block in found for number in range(block.first + 1, block.last)}
    return [line for number, line in enumerate(lines, start=1) if number not in inside]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n<!-- table: one -->\ntext", r"^a\.md:2: block 'one' has no '<!-- /table -->'$"),
        ("<!-- table: one -->\n<!-- table: two -->\n<!-- /table -->", r"^a\.md:2: block 'two' begins within 'one'"),
        ("text\n\n<!-- /table -->", r"^a\.md:3: '<!-- /table -->' ends no block$"),
        ("<!-- table: One -->\n<!-- /table -->", r"^a\.md:1: got '<!-- table: One -->', expected"),
        ("<!-- table one -->", r"^a\.md:1: got '<!-- table one -->', expected"),
        (" <!-- table: one -->", r"^a\.md:1: got ' <!-- table: one -->', expected"),
        ("<!-- table: one --> text", r"^a\.md:1: got '<!-- table: one --> text', expected"),
        ("<!-- table: one -->\n<!--/table-->", r"^a\.md:2: got '<!--/table-->', expected"),
    ],
)
def test_markers_that_make_no_blocks_are_named(text: str, message: str) -> None:
    with pytest.raises(blocks.BlockError, match=message):
        blocks.find(text, "a.md")


def test_a_sentence_may_speak_of_markers() -> None:
    assert blocks.find("Write `<!-- table: name -->` and `<!-- /table -->`.", "a.md") == []


# The whole ----------------------------------------------------------------------------------------------------------


def _tree(root: Path, page: str = "", readme: str = "") -> None:
    (root / "docs" / "deeper").mkdir(parents=True)
    (root / "README.md").write_text(readme, encoding="utf-8")
    (root / "docs" / "deeper" / "page.md").write_text(page, encoding="utf-8")


def _draw(numbers: Any) -> Figure:
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot(numbers)
    return figure


def _picture(*numbers: float) -> Picture:
    return Picture("a line", lambda: list(numbers), _draw)


def test_publishing_writes_what_checking_missed(tmp_path: Path) -> None:
    page = "Text.\n\n<!-- table: one -->\nold\n<!-- /table -->\n\n![A line](../images/line.svg)\n"
    _tree(tmp_path, page, "<!-- table: one -->\n<!-- /table -->\n")
    of = publishing.Sources({"one": lambda: "| new |"}, {"line": _picture(1.0, 2.0)})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.md")}
    missed = publishing.publish(tmp_path, of, check=True)
    assert [problem.split(":")[0] for problem in missed] == ["README.md", "docs/deeper/page.md", "docs/images/line.svg"]
    assert "-old\n+| new |" in missed[1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.md")} == before
    assert not (tmp_path / "docs" / "images").exists()
    assert publishing.publish(tmp_path, of, check=False) == []
    assert publishing.publish(tmp_path, of, check=True) == []
    assert "<!-- table: one -->\n\n| new |\n\n<!-- /table -->" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_written_does_not_hide_the_rest(tmp_path: Path) -> None:
    def fails() -> Any:
        raise KeyError("new_copy")

    page = "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("one", "two")) + "![](images/line.svg)\n"
    _tree(tmp_path, readme=page)
    picture = dataclasses.replace(_picture(1.0), data=fails)
    of = publishing.Sources({"one": fails, "two": lambda: "| new |"}, {"line": picture})
    problems = publishing.publish(tmp_path, of, check=False)
    assert [problem.split(" (test_publish.py:")[0] for problem in problems] == [
        "README.md:1: table 'one' cannot be written: KeyError: 'new_copy'",
        "docs/images/line.svg: cannot be drawn: KeyError: 'new_copy'",
    ]
    assert "| new |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_long_differences_are_cut(tmp_path: Path) -> None:
    _tree(tmp_path, readme="<!-- table: one -->\n<!-- /table -->\n")
    of = publishing.Sources({"one": lambda: "\n".join(map(str, range(100)))}, {})
    (problem,) = publishing.publish(tmp_path, of, check=True)
    assert "more lines" in problem
    assert len(problem.splitlines()) < 20


@pytest.mark.parametrize("check", [True, False])
def test_what_nothing_writes_and_what_nobody_shows_are_named(tmp_path: Path, check: bool) -> None:
    _tree(tmp_path, "\n<!-- table: two -->\n<!-- /table -->\n", "<!-- table: one -->\n")
    problems = publishing.publish(tmp_path, publishing.Sources({"one": str}, {"line": _picture(1.0)}), check=check)
    assert problems[:3] == [
        "README.md:1: block 'one' has no '<!-- /table -->'",
        "docs/deeper/page.md:2: no topic writes a table 'two'",
        "table 'one': no document shows it",
    ]
    assert problems[3] == "docs/images/line.svg: no document shows it"


def test_pictures_follow_their_numbers_and_not_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "line.svg"
    assert not _picture(1.0, 2.0).is_current(path)
    _picture(1.0, 2.0).write(path)
    first = path.read_bytes()
    _picture(1.0, 2.0).write(path)
    assert path.read_bytes() == first, "no dates, no random identifiers"
    assert b"<dc:date>" not in first
    assert b"<text" not in first, "letters are paths"
    path.write_bytes(first.replace(b"#1f77b4", b"#1f77b5"))  # as another version of matplotlib might draw it
    assert _picture(1.0, 2.0 * (1 + 1e-9)).is_current(path), "other processors add in another order"
    assert not _picture(1.0, 2.001).is_current(path)
    assert not dataclasses.replace(_picture(1.0, 2.0), title="another").is_current(path)


def test_pictures_that_nothing_draws_any_more_are_named(tmp_path: Path) -> None:
    _tree(tmp_path)
    _picture(1.0).write(tmp_path / "docs" / "images" / "old.svg")
    (tmp_path / "docs" / "images" / "logo.svg").write_text("<svg/>", encoding="utf-8")
    problems = publishing.publish(tmp_path, publishing.Sources({}, {}), check=True)
    assert problems == ["docs/images/old.svg: no topic draws it any more"]


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _tree(tmp_path, readme="<!-- table: one -->\n<!-- /table -->\n")
    monkeypatch.setattr(publishing, "ROOT", tmp_path)
    monkeypatch.setattr(publishing, "sources", lambda: publishing.Sources({"one": lambda: "| new |"}, {}))
    assert publishing.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("README.md:1: table 'one' is not what the results give")
    assert "python -m benchmarks.publish brings" in said
    assert publishing.main([]) == 0
    assert publishing.main(["--check"]) == 0


# Tables -------------------------------------------------------------------------------------------------------------

STEP = {"kind": "step", "dtype": "fp32", "out_features": 4096, "in_features": 4096, "tokens": 512, "rank": 16}


def _results(date: str = "2026-11-30", cpu: str = "AMD EPYC", cases: tuple[Case, ...] | None = None) -> Results:
    about = {
        "date": date, "device": "cpu", "gpu": None, "cpu": cpu, "instruction_set": "AVX2", "cores": 2, "threads": 2,
        "load_average": 0.1, "python": "3.12.1", "torch": "2.13.0", "dual_lora_kernels": "0.1.0", "commit": "abcdef0",
    }  # fmt: skip
    return Results("layer", "python -m benchmarks layer", about, cases or (_case(),), 2.0)


def _case(own: float = 1.1, **settings: Any) -> Case:
    times = {"floor": 1.0, "lora": 0.8, "dual_lora": own}
    return Case({**STEP, **settings}, "floor", {name: Measurement((value, value)) for name, value in times.items()})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Results]:
    """The documents that tables are made from, the newest of a machine first."""
    documents: list[Results] = []
    monkeypatch.setattr(shown, "every", lambda preset: [each for each in documents if each.preset == preset])
    return documents


def test_a_case_that_was_measured_again_is_the_newest(found: list[Results]) -> None:
    found += [
        _results("2026-12-02", cases=(_case(1.2),)),
        _results("2026-12-01", cases=(_case(1.5, base="dense"), _case(tokens=1))),
    ]
    (machine,) = shown.machines("layer", layers._is_step)
    assert sorted(shown.ratio(case, "dual_lora") for case in machine.cases.values()) == ["1.10", "1.20"]
    assert [run.environment["date"] for run in machine.runs] == ["2026-12-02", "2026-12-01"]
    assert machine.where(**STEP) is found[0].cases[0]
    found[:] = [found[0], dataclasses.replace(found[1], cases=(_case(1.5),))]
    (machine,) = shown.machines("layer", layers._is_step)
    assert list(machine.runs) == found[:1], "a run of which nothing is shown is not named"


def test_machines_stand_side_by_side_and_gaps_are_visible(found: list[Results]) -> None:
    bf16 = Case({**STEP, "dtype": "bf16"}, "floor", {"floor": Measurement((1.0,)), "dora": Measurement((2.0,))})
    intel = _results(cpu="Intel(R) Xeon(R) Processor", cases=(bf16,))
    found += [_results(), dataclasses.replace(intel, environment={**intel.environment, "instruction_set": "AMX"})]
    lines = layers.summary().splitlines()
    assert "AMD EPYC, AVX2, 2 threads<br>fp32 | Intel Xeon, AMX, 2 threads<br>bf16 |" in lines[0]
    assert lines[2:5] == [
        "| PEFT LoRA | 0.80 · – | – |",
        "| PEFT DoRA | – | 2.00 · – |",
        "| **dual_lora_kernels** | **1.10 · –** | – |",
    ]
    assert "`python -m benchmarks layer`" in lines[-1]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((0.5, 0.6), "| 2 | 0 | 0 | nowhere |"),
        ((0.8, 0.5), "| 1 | 1 | 0 | nowhere |"),
        ((1.6, 1.2), "| 0 | 0 | 2 | everywhere, by 1.50 to 2.00 |"),
        ((1.6, 1.6), "| 0 | 0 | 2 | everywhere, by 2.00 |"),
        ((1.6, 0.4), "| 1 | 0 | 1 | fp32, 4096², 512 tokens: 2.00 |"),
    ],
)
def test_where_it_loses_is_said(found: list[Results], own: tuple[float, float], expected: str) -> None:
    found.append(_results(cases=(_case(own[0]), _case(own[1], tokens=1))))
    against = [line for line in layers.standing().splitlines() if line.startswith("| PEFT LoRA |")]
    assert [line.split("threads ")[1] for line in against] == [expected]


def test_dtypes_without_units_do_not_count_as_won_and_that_is_said(found: list[Results]) -> None:
    found.append(_results(cases=(_case(1.6), _case(0.1, dtype="bf16"), _case(0.1, dtype="fp16"))))
    standing, summary = layers.standing(), layers.summary()
    assert "| 0 | 0 | 1 | everywhere, by 2.00 |" in standing
    assert "bf16 |" not in summary
    for text in (standing, summary):
        assert text.count("Not counted here: half dtypes on AMD EPYC, AVX2, 2 threads") == 1
    assert "bf16, 4096²" in layers.by_machine()


def test_a_subject_without_a_label_is_an_error(found: list[Results]) -> None:
    found.append(_results(cases=(Case(STEP, "floor", {"floor": Measurement((1.0,)), "other": Measurement((1.0,))}),)))
    with pytest.raises(ValueError, match="subject 'other'"):
        layers.summary()


def test_what_was_left_out_has_its_reason(found: list[Results]) -> None:
    missing = Measurement(left_out="no compiler")
    found.append(_results(cases=(Case(STEP, "floor", {"floor": Measurement((1.0,)), "lora_compiled": missing}),)))
    assert "- PEFT LoRA, torch.compile, fp32, 4096², 512 tokens: no compiler" in layers.by_machine()


def test_models_are_shown_over_their_floor(found: list[Results]) -> None:
    settings = {
        "kind": "train", "dtype": "bf16", "model": "llama-h1024", "hidden_size": 1024, "layers": 8, "batch": 4,
        "sequence": 256, "tokens": 1024, "rank": 16, "base": "dense", "checkpointing": False,
    }  # fmt: skip
    times = {"floor": 2.0, "lora": 1.0, "dual_lora": 2.5}
    subjects = {
        name: Measurement((value,), 10, bytes={"held": 2**21, "peak": 2**20}, counts={"tokens": 1024})
        for name, value in times.items()
    }
    small = Case({**settings, "hidden_size": 512}, "floor", subjects)
    few = Case({**settings, "hidden_size": 2048, "model": "large", "sequence": 8, "tokens": 32}, "floor", subjects)
    found.append(dataclasses.replace(_results(cases=(few, Case(settings, "floor", subjects), small)), preset="model"))
    assert "large" not in models.summary() + models.comparison() + str(models._numbers())
    assert "large, 8 layers" in models.by_machine()
    summary = models.summary().splitlines()
    assert "| **dual_lora_kernels** | **410 · 1.25** |" in summary
    assert "| **dual_lora_kernels** | **1.0 · –** |" in summary
    assert any(
        "| PEFT LoRA | 942 | 1.00 | 22.3 | 1.00 | 1.00 | 1.00 | 10 |" in line
        for line in models.comparison().splitlines()
    )


def test_layers_have_short_names() -> None:
    assert ranks.short_name("model.layers.2.mlp.up_proj") == "2 up"
