"""The suite's layers: subjects are timed only if they compute what they claim, and results are as the schema says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from benchmarks import command
from benchmarks.harness.report import RESULTS
from benchmarks.harness.results import Case, read
from benchmarks.layers import cases, methods, parts
from benchmarks.layers.cases import DECODE_SUBJECTS, STEP_SUBJECTS, Shape, decode_case, step_case
from benchmarks.layers.checks import ALLOWED, Checker, refusal
from benchmarks.layers.claims import CLAIMS, SEED, Layer
from benchmarks.layers.layer_step import FLOOR, floor_step, step
from benchmarks.layers.methods import FROZEN
from benchmarks.presets import layer as layer_preset
from dual_lora_kernels import available_backends
from dual_lora_kernels.backends import resolve_backend

SMALL = Shape(48, 40, 24, rank=4)
COMPILED = ("lora_compiled", "naive_compiled")


@pytest.fixture(autouse=True)
def no_more_work_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(cases, "_MOST_IN_TURN", 3)


def _layer(dtype: torch.dtype = torch.float32, shape: Shape = SMALL, seed: int = 0) -> tuple[nn.Linear, Layer]:
    torch.manual_seed(seed)
    linear = methods.frozen_linear(shape.in_features, shape.out_features, dtype)
    x = torch.randn(shape.tokens, shape.in_features, dtype=dtype).requires_grad_()
    grad = torch.randn(shape.tokens, shape.out_features, dtype=dtype)
    return linear, Layer(linear.weight.detach(), x, grad, shape.rank)


def _errors(name: str, module: nn.Module, layer: Layer, claim: str | None = None) -> dict[str, float]:
    checker = Checker(layer)
    names = checker.give_values(claim or name, module)
    torch.manual_seed(SEED)
    assert layer.grad is not None
    return checker.errors(claim or name, step(module, layer.x, layer.grad)(), names)


class OnActivations(methods.NaiveDualLora):
    """What one adopter computes: the nonlinearities on the activations, which is another function."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        magnitude, direction = input @ self.A.t() @ self.B.t(), input @ self.C.t() @ self.D.t()
        sign = methods.SignStraightThrough.apply(direction, "clip", 1.0)
        return nn.functional.linear(input, self.weight) + self.scale * torch.relu(magnitude) * sign


class OtherScale(methods.NaiveDualLora):
    """A scale that is off by a thousandth."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.scale = methods.ALPHA / 4 * 1.001
        return super().forward(input)


class NoClip(methods.NaiveDualLora):
    """The right output, and gradients of C and D that are not clipped."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        sign = methods.SignStraightThrough.apply(self.D @ self.C, "dorefa", 1.0)
        return nn.functional.linear(input, self.weight + self.scale * torch.relu(self.B @ self.A) * sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in STEP_SUBJECTS if name not in COMPILED])
def test_every_subject_computes_what_it_claims(name: str, dtype: torch.dtype) -> None:
    linear, layer = _layer(dtype)
    module = methods.build(name, linear, layer.rank, layer.rank)
    errors = _errors(name, module, layer)
    trained = methods.trainable_parameters(module)
    assert len(errors) == 2 + len(trained), "the output, and the gradients of the input and of every parameter"
    assert refusal(errors) is None, errors
    if name not in ("frozen", "full"):  # the values that it was checked with are an update that matters
        plain = nn.functional.linear(layer.x, layer.weight)
        assert (module(layer.x) - plain).norm() > 0.3 * plain.norm()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [(OnActivations, "output"), (OtherScale, "output"), (NoClip, "gradient of ")],
)
def test_a_subject_that_computes_something_else_is_refused(wrong: type[methods.NaiveDualLora], what: str) -> None:
    linear, layer = _layer(shape=Shape(48, 40, 256, rank=4))  # so many that gradients are clipped
    errors = _errors("naive", wrong(methods.share(linear), 4, 4), layer)
    assert any(key.startswith(what) and error > ALLOWED for key, error in errors.items())
    reason = refusal(errors)
    assert reason is not None
    assert "computes something else than it claims" in reason


def test_a_method_that_claims_to_be_another_is_refused() -> None:
    """Rounding to nearest, which is naive's, is not the dither."""
    linear, layer = _layer(torch.bfloat16)
    module = methods.build("naive", linear, 4, 4)
    assert refusal(_errors("naive", module, layer)) is None
    assert refusal(_errors("naive", module, layer, claim="dual_lora")) is not None


def test_other_parameters_than_claimed_are_refused() -> None:
    linear, layer = _layer()
    with pytest.raises(ValueError, match=r"A: got shape \(8, 40\), expected \(4, 40\)"):
        Checker(layer).give_values("dual_lora", methods.build("dual_lora", linear, 8, 8))
    with pytest.raises(ValueError, match="trains nothing, expected A, B, C, D"):
        Checker(layer).give_values("dual_lora", linear)


def test_nan_is_refused() -> None:
    assert refusal({"output": 1.0}) is None
    assert "nan" in str(refusal({"output": 1.0, "gradient of A": math.nan}))


def test_the_three_products_are_checked_too() -> None:
    linear, layer = _layer()
    assert layer.grad is not None
    returned = list(floor_step(linear.weight, layer.x, layer.grad)())
    checker = Checker(layer)
    assert refusal(checker.errors(FLOOR, returned, ["weight"])) is None
    returned[2] = returned[2] + 1e-4
    assert "gradient of weight" in str(refusal(checker.errors(FLOOR, returned, ["weight"])))


def test_a_step_is_checked_timed_and_traced() -> None:
    found = step_case(SMALL, ("frozen", "lora", *COMPILED, "dual_lora"), rounds=3)
    assert found.reference == FLOOR
    assert found.timed() == [FLOOR, "frozen", "lora", *COMPILED, "dual_lora"]
    for name, subject in found.subjects.items():
        assert len(subject.seconds) == 3
        assert subject.checked
        assert max(subject.checked.values()) <= ALLOWED
        assert set(subject.bytes) == (set() if name == FLOOR else {"temporary", "peak"})
    assert found.subjects["lora"].trainable == found.subjects["dual_lora"].trainable == 8 * (48 + 40)


def test_small_layers_have_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_ENOUGH_SECONDS", 1e9)
    monkeypatch.setattr(cases, "_MOST_ROUNDS", 11)
    assert len(step_case(SMALL, ("frozen",), rounds=3).subjects[FLOOR].seconds) == 11


def _planted(builder: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(methods.METHODS, "naive", builder)
    return step_case(SMALL, ("naive", "frozen"), rounds=2)


def test_a_wrong_subject_is_not_timed_and_the_case_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _planted(OnActivations, monkeypatch)
    assert found.timed() == [FLOOR, "frozen"]
    assert "computes something else" in str(found.subjects["naive"].left_out)
    assert found.subjects["naive"].checked["output"] > ALLOWED


def test_a_subject_that_fails_is_left_out_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> nn.Module:
        raise ImportError("peft is not installed")

    found = _planted(missing, monkeypatch)
    assert found.timed() == [FLOOR, "frozen"]
    assert found.subjects["naive"].left_out == "ImportError: peft is not installed"


def test_decoding_goes_through_layers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "_IN_TURN_BYTES", 2 * 48 * 40 * 4)
    found = decode_case(Shape(48, 40, 2, rank=4), rounds=2)
    assert found.reference == FROZEN
    assert found.timed() == [FROZEN, *DECODE_SUBJECTS]
    assert {subject.counts["layers_in_turn"] for subject in found.subjects.values()} == {2}
    assert all(set(subject.checked) == {"output"} for subject in found.subjects.values())


def test_every_subject_has_a_claim_and_a_label() -> None:
    assert {FLOOR, *STEP_SUBJECTS, *DECODE_SUBJECTS} <= CLAIMS.keys() & methods.LABELS.keys()


@pytest.mark.parametrize("preset", ["layer", "decode"])
def test_presets_write_what_the_schema_says(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    sizes = f"--shape 48x40 --tokens 3 5 --dtype fp32 bf16 --rank 4 --rounds 2 --threads {threads}"
    subjects = " --subjects lora dual_lora" if preset == "layer" else ""
    assert command.main([preset, *(sizes + subjects).split(), "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*/{preset}.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(document, json.loads((RESULTS / "schema.json").read_text(encoding="utf-8")))
    results = read(path)
    asked = [(dtype, tokens) for dtype in ("fp32", "bf16") for tokens in (3, 5)]
    assert [(case.settings["dtype"], case.settings["tokens"]) for case in results.cases] == asked
    assert results.self_check["median"] > 0
    assert capsys.readouterr().out.count("48 × 40") == len(asked)


@pytest.mark.parametrize(
    "arguments",
    ["--shape 4096", "--shape 0x8", "--tokens 0", "--dtype int8", "--rank -1", "--subjects qlora", "--device tpu"],
)
@pytest.mark.parametrize("preset", ["layer", "decode"])
def test_bad_arguments_are_refused(preset: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([preset, *arguments.split()])
    assert "error: " in capsys.readouterr().err


def test_large_layers_in_a_slow_dtype_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = command._parser("layer", layer_preset)
    options = parser.parse_args([])
    monkeypatch.setattr(layer_preset, "slow_products", lambda *_: "they are slow")
    wanted, notes = layer_preset._wanted(options)
    assert [shape for shape, _ in wanted if shape.dtype == "bf16"] == [layer_preset._SLOW_LAYER]
    assert notes == ("Only 512² with 128 tokens was measured in bf16: they are slow.",)
    monkeypatch.setattr(layer_preset, "slow_products", lambda *_: None)
    wanted, notes = layer_preset._wanted(options)
    assert len({shape for shape, _ in wanted}) == len(layer_preset._LAYERS)
    assert notes == ()


def test_parts_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    eager = resolve_backend("eager", torch.device("cpu"), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="backend: got 'eager', expected one that shares products"):
        parts.parts(eager, 48, 40, 6, 4)
    arguments = f"--shape 48x40 --tokens 6 --rank 4 --rounds 2 --threads {torch.get_num_threads()}".split()
    if "native" in available_backends():
        parts.main(arguments)
        shown = capsys.readouterr().out
        assert all(name in shown for name in parts.BOUNDS)
    else:
        with pytest.raises(ValueError, match="native"):
            parts.main(arguments)


def test_what_pytorch_would_no_longer_compile_is_an_error() -> None:
    """It would run the module as it is otherwise, and its time would stand for a compiled one's."""

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    module = methods.compiled(Doubled())
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        module(torch.zeros(2))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            module(torch.zeros(3))
    torch.compiler.reset()
