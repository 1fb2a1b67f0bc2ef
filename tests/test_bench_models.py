"""Whole models in the benchmark suite: their shapes, sharing, the floor, memory, and checks that find what is wrong."""

from __future__ import annotations

import argparse
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.harness.results import Measurement
from benchmarks.layers import methods
from benchmarks.layers.methods import LABELS, MERGED, PREPARED
from benchmarks.models import checks, measure, memory, shapes, subjects
from benchmarks.models.base import adapted_linears, base_model, random_model, twin
from benchmarks.models.case import ModelCase
from benchmarks.models.floor import FloorLinear
from benchmarks.models.measure import generate, train
from benchmarks.models.shares import SHARES, shares
from benchmarks.models.steps import batch, training_step
from benchmarks.presets import model as preset
from dual_lora_kernels import available_backends

SMALL = ModelCase("llama-h64", batch=2, sequence=8, layers=2, rank=4)
EAGER = [name for name in dict.fromkeys((*subjects.TRAINED, *subjects.GENERATING)) if "compiled" not in name]
"""Inductor takes half a minute for each of the others."""
# Of the published models (huggingface.co/meta-llama), by the libraries that load them.
PUBLISHED = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3-8b": 8_030_261_248}


@pytest.fixture
def silent() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_shapes_have_the_published_numbers_of_parameters(name: str) -> None:
    assert shapes.shape(name).parameters == PUBLISHED[name]
    with torch.device("meta"):
        built = random_model(shapes.shape(name, layers=1), torch.bfloat16, "meta")
    assert sum(p.numel() for p in built.parameters()) == shapes.shape(name, layers=1).parameters
    assert [tuple(linear.weight.shape) for _, linear in adapted_linears(built)] == shapes.shape(name, layers=1).linears


@pytest.mark.parametrize("name", ["llama-h100", "llama-h0", "gpt-2", "llama-h-64"])
def test_unknown_models_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"model: got '{name}', expected llama-hN"):
        ModelCase(name)


def test_the_floor_costs_three_products_and_computes_the_frozen_layer() -> None:
    linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
    scratch = torch.full((30,), 7.0)
    floor = FloorLinear(linear, scratch)
    x, grad = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 4)
    assert torch.equal(floor(x), linear(x))
    (own,) = torch.autograd.grad(floor(x), x, grad)
    assert torch.equal(own, grad @ linear.weight)
    assert torch.equal(scratch[:24].view(4, 6), grad.view(-1, 4).t() @ x.detach().view(-1, 6))
    assert torch.equal(scratch[24:], torch.full((6,), 7.0)), "numbers beyond the weight's size are another layer's"


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_frozen_weights_are_in_memory_once_and_training_leaves_them(base: str) -> None:
    case = ModelCase("llama-h64", "bf16", batch=2, sequence=8, layers=1, rank=4, base=base)
    shared = base_model(case)
    before = {name: parameter.clone() for name, parameter in shared.named_parameters()}
    addresses = {parameter.data_ptr() for parameter in shared.parameters()}
    for name in EAGER if base == "dense" else ("frozen", "lora", "dual_lora"):
        own = subjects.subject_model(shared, name, case)
        if name not in (PREPARED, MERGED):
            training_step(own, batch(case))()
        frozen = {p.data_ptr() for p in own.parameters() if not p.requires_grad}
        if name != MERGED:
            assert frozen <= addresses, f"{name} has frozen weights of its own"
    for name, parameter in shared.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was changed"


def test_a_twin_shares_what_it_does_not_change() -> None:
    shared = base_model(SMALL)
    own = twin(shared, own_linears=True)
    names = {f"{name}.weight" for name, _ in adapted_linears(shared)}
    for (name, mine), (_, theirs) in zip(own.named_parameters(), shared.named_parameters(), strict=True):
        assert (mine is theirs) == (name not in names)


def test_a_subject_with_other_trainable_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = methods.PEFT_METHODS["lora"]
    monkeypatch.setitem(methods.PEFT_METHODS, "lora", (config, lambda r1, _: {"r": r1}))
    with pytest.raises(ValueError, match="subject: 'lora' trains 9856 parameters, expected 19712"):
        subjects.subject_model(base_model(SMALL), "lora", SMALL)
    with pytest.raises(ValueError, match="subject: got 'vera', expected one of frozen, "):
        subjects.subject_model(base_model(SMALL), "vera", SMALL)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_subject_computes_what_it_claims(dtype: str) -> None:
    errors, refused = checks.checked(ModelCase("llama-h64", dtype), EAGER)
    assert refused == {}
    for name in EAGER:
        expected = {checks.LOGITS, checks.EMBEDDED, checks.PARAMETERS, checks.LIKE_NAIVE}
        if name in (PREPARED, MERGED):
            expected -= {checks.EMBEDDED, checks.PARAMETERS}
        if name in ("frozen", "floor", "dual_lora_half"):
            expected.discard(checks.PARAMETERS)
        if not name.startswith("dual_lora"):
            expected.discard(checks.LIKE_NAIVE)
        assert errors[name].keys() == expected


def test_the_checks_hold_with_checkpointing_on_four_bits_and_in_real_shapes() -> None:
    for case, names in (
        (ModelCase("llama-3.2-1b", "bf16"), ("floor", "lora", "dual_lora", "dual_lora_merged")),
        (ModelCase("llama-h64", checkpointing=True), ("floor", "lora", "dora", "dual_lora")),
        (ModelCase("llama-h64", base="nf4"), subjects.ON_NF4),
    ):
        errors, refused = checks.checked(case, names)
        assert (set(errors), refused) == (set(names), {})


def test_a_subject_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch, silent: Console) -> None:
    for module in (methods, subjects):
        monkeypatch.setattr(module, "ALPHA", 31.0)  # the claims keep theirs
    case = train(SMALL, ("frozen", "lora", "dual_lora"), 3, silent, memory=False)
    assert case.timed() == ["floor", "frozen"]
    for name in ("lora", "dual_lora"):
        assert "computes something else than it claims" in str(case.subjects[name].left_out)


def test_an_adapter_without_effect_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_LEAST_CHANGE", 1e9)
    errors, refused = checks.checked(SMALL, ("frozen", "naive"))
    assert set(errors) == {"frozen"}
    assert "the adapter of 'naive' changes the logits by" in refused["naive"]


def test_memory_of_a_step() -> None:
    """Naive keeps five tensors of every weight's size; a checkpointed step keeps one block's activations."""
    found = {name: memory.step_memory(SMALL, name) for name in ("frozen", "naive", "dual_lora")}
    weights = sum(n * k for n, k in SMALL.shape.linears) * 4
    assert found["frozen"]["held"] == pytest.approx(SMALL.shape.parameters * 4, rel=0.01)  # and the rotary's buffers
    assert found["naive"]["peak"] > found["frozen"]["peak"] + 4 * weights
    assert found["dual_lora"]["peak"] < found["naive"]["peak"] - 3 * weights
    adapters = subjects.expected_trainable("naive", SMALL) * 4
    assert found["naive"]["held"] - found["frozen"]["held"] == pytest.approx(3 * adapters, rel=0.01)


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ModelCase("llama-3.2-1b", "bf16")
    monkeypatch.setattr(memory, "free_bytes", lambda _: 8 * memory.GIBIBYTE)
    room = memory.Room(case)
    assert room.why_not("lora") is None
    reason = room.why_not("full")
    assert reason == "needs about 9.2 GiB beside the others, and 6.1 GiB of this machine's memory are free for it"
    monkeypatch.setattr(memory, "free_bytes", lambda _: None)
    assert memory.Room(case).why_not("full") is None


def test_shares_of_a_step_add_up() -> None:
    step = training_step(subjects.subject_model(base_model(SMALL), "dual_lora", SMALL), batch(SMALL))
    found = shares(step)
    assert set(found) == set(SHARES)
    assert sum(found.values()) == pytest.approx(1)
    assert (found["kernels"] > 0) == ("native" in available_backends())


def test_generation_is_the_same_before_and_after_merging(silent: Console) -> None:
    case = generate(ModelCase("llama-h64", batch=1, sequence=4, layers=1, rank=4), subjects.GENERATING, 3, 2, silent)
    assert case.timed() == list(subjects.GENERATING)
    assert case.settings["new_tokens"] == 3
    assert all(measured.counts["tokens"] == 3 for measured in case.subjects.values())


def test_the_preset_end_to_end(silent: Console) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    preset.add(parser)
    chosen = "--quick --rounds 2 --device cpu --cases train generate --no-memory --new-tokens 2 --rank 4"
    results = preset.run(parser.parse_args(chosen.split()), silent)
    assert [case.settings["kind"] for case in results.cases] == ["train", "generate"]
    title, headings, cells = preset.table(results.cases[0])
    assert title == "Training step: llama-h128, 2 layers, fp32, 4 × 32 tokens, r1=r2=4"
    assert [row[0] for row in cells] == [LABELS[name] for name in results.cases[0].subjects]
    assert all(len(row) == len(headings) for row in cells)
    assert cells[0][3] == "1.000"


def test_a_table_says_what_is_left_out() -> None:
    case = train(SMALL, ("frozen",), 1, Console(file=io.StringIO()), memory=False)
    missing = {**case.subjects, "full": Measurement(left_out="no room")}
    title, _, cells = preset.table(type(case)(case.settings, case.reference, missing))
    assert "full left out: no room" in title
    assert len(cells) == 2


def test_the_preset_refuses_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    preset.add(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "llama-2"])
    assert "argument --model: model: got 'llama-2', expected llama-hN" in capsys.readouterr().err


def test_memory_that_cannot_be_measured_costs_no_times(monkeypatch: pytest.MonkeyPatch, silent: Console) -> None:
    def refuse(*_: object) -> dict[str, int]:
        raise RuntimeError("CUDA out of memory\nwith a long story")

    monkeypatch.setattr(measure, "step_memory_apart", refuse)
    remarks: list[str] = []
    case = train(SMALL, ("frozen",), 1, silent, remark=remarks.append)
    assert case.timed() == ["floor", "frozen"]
    assert case.subjects["frozen"].left_out is None
    assert remarks[1] == "The memory of frozen was not measured: RuntimeError: CUDA out of memory"


def test_a_subject_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch, silent: Console) -> None:
    def broken(base: nn.Module, subject: str, *rest: object) -> nn.Module:
        if subject == "lora":
            raise RuntimeError("no compiler\nand a traceback")
        return subjects.subject_model(base, subject, *rest)

    monkeypatch.setattr(checks, "subject_model", broken)
    case = train(SMALL, ("frozen", "lora"), 1, silent, memory=False)
    assert case.timed() == ["floor", "frozen"]
    assert case.subjects["lora"].left_out == "RuntimeError: no compiler"


def test_subjects_that_no_case_has_are_refused(silent: Console) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    preset.add(parser)
    chosen = "--quick --device cpu --cases train --subjects lora dual_lora_merged"
    options = parser.parse_args(chosen.split())
    with pytest.raises(ValueError, match="--subjects: got dual_lora_merged, which the cases train do not have"):
        preset.run(options, silent)


def test_memory_is_not_measured_with_another_installation() -> None:
    with pytest.raises(RuntimeError, match="another dual_lora_kernels"):
        memory._like_here(SMALL, "frozen", "elsewhere/dual_lora_kernels/__init__.py")
