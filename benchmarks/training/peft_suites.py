"""PEFT's own tests on Dual LoRA: its configuration in the place of the other methods', on local random models.

    python -m benchmarks.training.peft_suites CHECKOUT

CHECKOUT is a checkout of huggingface/peft near the installed version; what its tests import must be installed (beside
PEFT: diffusers, parameterized, scipy, scikit-learn, requests). The tests are copied and changed in the copy alone.
Models have the names under which the tests look for them on the hub, which is not asked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import transformers as t
from rich.console import Console

from ..harness import report
from ..harness.environment import environment, sentence

STEM = "peft_suites"
HEADINGS = ("suite", "passed", "failed", "skipped")
_IMPORT = "from dual_lora_kernels.peft import DualLoraConfig\n"
_SMALL = '"r1": 8, "r2": 4'
_SUITES = {  # file → (the list of configurations in it, what it holds instead)
    "test_custom_models": (
        "TEST_CASES",
        """[
    ("Dual LoRA 1", "MLP", DualLoraConfig, {"target_modules": "lin0"}),
    ("Dual LoRA 2", "MLP", DualLoraConfig, {"target_modules": ["lin0"]}),
    ("Dual LoRA 3", "MLP", DualLoraConfig, {"target_modules": ["lin0", "lin1"]}),
    ("Dual LoRA 4", "MLP", DualLoraConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Dual LoRA 5", "MLP", DualLoraConfig, {"target_modules": ["lin0"], "r1": 4, "r2": 8, "alpha": 4, "dropout": 0.1}),
    ("Dual LoRA 6", "EmbConv1D", DualLoraConfig, {"target_modules": ["conv1d"]}),
]""",
    ),
    "test_decoder_models": ("ALL_CONFIGS", f'[(DualLoraConfig, {{"task_type": "CAUSAL_LM", {_SMALL}}})]'),
    "test_encoder_decoder_models": ("ALL_CONFIGS", f'[(DualLoraConfig, {{"task_type": "SEQ_2_SEQ_LM", {_SMALL}}})]'),
    "test_feature_extraction_models": (
        "ALL_CONFIGS",
        f'[(DualLoraConfig, {{"task_type": "FEATURE_EXTRACTION", {_SMALL}}})]',
    ),
    "test_seq_classifier": ("ALL_CONFIGS", f'[(DualLoraConfig, {{"task_type": "SEQ_CLS", {_SMALL}}})]'),
}
_SAME = '{"target_modules": ["lin0"], "init_weights": False}'
_OTHER = '{"target_modules": ["lin1"], "init_weights": False}'
_MORE = {  # further lists of test_custom_models
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": f"""[
    ("Dual LoRA same", "dual_lora", DualLoraConfig, {_SAME}, {_SAME}),
    ("Dual LoRA different", "dual_lora", DualLoraConfig, {_SAME}, {_OTHER}),
]""",
    "MIXED_ADAPTER_TEST_CASES": f"""[
    ("Dual LoRA same", DualLoraConfig(**{_SAME}), DualLoraConfig(r1=4, **{_SAME})),
    ("Dual LoRA different", DualLoraConfig(**{_SAME}), DualLoraConfig(**{_OTHER})),
]""",
}


def replaced(source: str, name: str, items: str) -> str:
    """`source`, in which the list called `name` holds `items` before anything reads it. ValueError if it has none."""
    match = re.search(rf"^{name} = \[.*?^\]\n", source, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"checkout: got tests without a list {name}, expected those of a PEFT near the installed one")
    return source[: match.end()] + f"{_IMPORT}{name}[:] = {items}\n" + source[match.end() :]


def prepare(checkout: Path, folder: Path) -> None:
    """A copy of PEFT's tests in `folder`, with Dual LoRA's configurations."""
    shutil.copytree(checkout / "tests", folder / "tests")
    for suite, (name, items) in _SUITES.items():
        file = folder / "tests" / f"{suite}.py"
        source = replaced(file.read_text(), name, items)
        for other, others in _MORE.items() if suite == "test_custom_models" else ():
            source = replaced(source, other, others)
        file.write_text(source)


def write_models(folder: Path) -> None:
    """Tiny random models, each in a folder of the name that the tests load."""
    torch.manual_seed(0)
    vocabulary: dict[str, Any] = {"vocab_size": 1000}
    llama = vocabulary | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    bert = vocabulary | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    gpt = vocabulary | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    opt = t.OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64, **vocabulary,
    )  # fmt: skip
    t5 = t.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, **vocabulary)
    bart = t.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, **vocabulary,
    )  # fmt: skip
    peft, trl, hf = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
    models: dict[str, Any] = {
        f"{peft}/tiny-random-OPTForCausalLM": t.OPTForCausalLM(opt),
        f"{peft}/tiny-random-GPT2LMHeadModel": t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        f"{hf}/tiny-random-gpt2": t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        f"{peft}/tiny-random-GPTJForCausalLM": t.GPTJForCausalLM(t.GPTJConfig(rotary_dim=4, **gpt)),
        f"{trl}/tiny-random-LlamaForCausalLM": t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        f"{peft}/tiny-dummy-qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**llama)),
        f"{hf}/tiny-random-MistralForCausalLM": t.MistralForCausalLM(t.MistralConfig(**llama)),
        f"{hf}/tiny-random-Gemma3ForCausalLM": t.Gemma3ForCausalLM(t.Gemma3TextConfig(head_dim=8, **llama)),
        f"{peft}/tiny-random-T5ForConditionalGeneration-calibrated": t.T5ForConditionalGeneration(t5),
        f"{peft}/tiny-random-BartForConditionalGeneration": t.BartForConditionalGeneration(bart),
        f"{peft}/tiny-random-BertModel": t.BertModel(t.BertConfig(**bert)),
        f"{peft}/tiny-random-RobertaModel": t.RobertaModel(t.RobertaConfig(**bert)),
        f"{peft}/tiny-random-DebertaModel": t.DebertaModel(t.DebertaConfig(**bert)),
        f"{peft}/tiny-random-DebertaV2Model": t.DebertaV2Model(t.DebertaV2Config(**bert)),
        f"{peft}/tiny-random-BertForSequenceClassification": t.BertForSequenceClassification(t.BertConfig(**bert)),
        f"{peft}/tiny-random-RobertaForSequenceClassification": t.RobertaForSequenceClassification(
            t.RobertaConfig(**bert)
        ),
        f"{trl}/tiny-LlamaForSequenceClassification-3.2": t.LlamaForSequenceClassification(
            t.LlamaConfig(pad_token_id=0, **llama)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)


def run(folder: Path) -> ElementTree.Element:
    """The suites' tests with Dual LoRA in their names, as pytest's report."""
    files = [f"tests/{suite}.py" for suite in _SUITES]
    chosen = ["-k", "DualLora or Dual", "-o", "addopts=", "-p", "no:cacheprovider", "-n", "auto", "--tb=no", "-q"]
    arguments = [*files, *chosen, "--rootdir", str(folder), "-c", os.devnull, "--junitxml", "report.xml"]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=folder, env=environ, check=False)
    return ElementTree.parse(folder / "report.xml").getroot()


def outcome(case: ElementTree.Element) -> str:
    """What became of a test, in the headings' words."""
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.peft_suites", description="PEFT's own tests on Dual LoRA."
    )
    parser.add_argument("checkout", type=Path, help="a checkout of huggingface/peft")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    console, about = Console(), environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            prepare(options.checkout, folder)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        write_models(folder)
        cases = run(folder).findall(".//testcase")
    counts = {
        suite: Counter(outcome(case) for case in cases if suite in case.get("classname", "")) for suite in _SUITES
    }
    counts["all"] = Counter(map(outcome, cases))
    failed = Counter(case.get("name", "").partition("[")[0] for case in cases if outcome(case) == "failed")
    cells = [(suite, *(str(count[kind]) for kind in HEADINGS[1:])) for suite, count in counts.items()]
    title = "PEFT's own tests on Dual LoRA"
    report.print_table(title, HEADINGS, cells, console)
    names = "Failed: " + ", ".join(f"`{test}` ({count})" for test, count in failed.items()) + "."
    console.print(names)
    document = {"environment": about, "counts": counts, "failed": failed}
    reading = "docs/peft.md says why these fail. Skipped are tests that PEFT skips for what is no LoRA."
    report.write(
        options.out,
        STEM,
        document,
        [f"# {title}", report.markdown_table(HEADINGS, cells), names, reading, sentence(about)],
    )


if __name__ == "__main__":
    main()
