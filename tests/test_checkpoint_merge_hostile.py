"""What does not fit, is damaged or is hostile is refused by name, and nothing is written, removed or executed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora_kernels import merge_checkpoint
from dual_lora_kernels.adapter_files import WEIGHTS_FILE
from dual_lora_kernels.checkpoint_merge import merge, shards, unfinished

from .checkpoints import write_tensors
from .merged_checkpoints import content, refused, save_adapter, save_base, save_inputs, tensors
from .models import gpt2, llama

ROOT = Path(__file__).parents[1]
LAYER = "model.layers.0.self_attn.q_proj"
INDEX = "model.safetensors.index.json"
FILE = r"dual_lora_model\.safetensors'"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests copy."""
    return save_inputs(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def here(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "here")
    return tmp_path / "here"


def index_of(here: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((here / "base" / INDEX).read_text())
    return document


def write_index(here: Path, document: object) -> None:
    (here / "base" / INDEX).write_text(json.dumps(document))


def first_shard(here: Path) -> Path:
    return here / "base" / sorted(index_of(here)["weight_map"].values())[0]


# --- the index and its files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../adapter/dual_lora_model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a/b.safetensors",
        "..\\b.safetensors",
        "b.bin",
        3,
    ],
)
def test_an_index_that_points_elsewhere(name: object, here: Path) -> None:
    document = index_of(here)
    document["weight_map"][f"{LAYER}.weight"] = name
    write_index(here, document)
    refused(here, ValueError, rf"index\.json' says that {LAYER}\.weight is in .*, expected the name of a \.safetensors")


@pytest.mark.parametrize("document", [[], {}, {"weight_map": {}}, {"weight_map": [1]}, "text"])
def test_an_index_that_is_none(document: object, here: Path) -> None:
    write_index(here, document)
    refused(here, ValueError, r"index\.json' (has no weight_map|is a \w+, expected an object)")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"])
def test_an_index_that_is_no_json(text: str, here: Path) -> None:
    (here / "base" / INDEX).write_bytes(text.encode("latin-1"))
    refused(here, ValueError, r"index\.json' is no JSON")


def test_an_index_that_names_itself_or_what_is_missing(here: Path) -> None:
    document = index_of(here)
    document["weight_map"][f"{LAYER}.weight"] = "none.safetensors"
    write_index(here, document)
    refused(here, FileNotFoundError, r"none\.safetensors")
    shutil.copy(here / "base" / INDEX, here / "base" / "none.safetensors")
    refused(here, ValueError, r"none\.safetensors' is no safetensors file, or damaged")


def test_an_index_and_shards_that_disagree(here: Path) -> None:
    document = index_of(here)
    own = document["weight_map"][f"{LAYER}.weight"]
    other = next(name for name in document["weight_map"].values() if name != own)
    document["weight_map"][f"{LAYER}.weight"] = other
    write_index(here, document)
    refused(here, ValueError, rf"{LAYER}\.weight is in .*{own}' and, or by model.*, in {other}: expected it once")
    document["weight_map"][f"{LAYER}.weight"] = own
    document["weight_map"]["more.weight"] = own
    write_index(here, document)
    refused(here, ValueError, rf"{own}' has no more\.weight, which model\.safetensors\.index\.json says it has")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard(share: float, here: Path) -> None:
    shard = first_shard(here)
    os.truncate(shard, int(shard.stat().st_size * share))
    refused(here, ValueError, rf"{shard.name}' is no safetensors file, or damaged: .*truncated")


def test_a_link_that_goes_in_circles(here: Path) -> None:
    shard = first_shard(here)
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(here, OSError, shard.name)
    shard.unlink()
    os.mkfifo(shard)
    before = sorted(path.name for path in here.iterdir())
    with pytest.raises(ValueError, match=rf"{shard.name}' is no regular file"):
        merge_checkpoint(here / "base", here / "adapter", here / "out")
    assert sorted(path.name for path in here.iterdir()) == before


# --- files that would be copied -------------------------------------------------------------------------------------


def test_a_link_out_of_the_base_is_not_copied(here: Path, tmp_path: Path) -> None:
    """A downloaded folder could point at the user's keys, and the merged model be published."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    for name in ("vocab.json", "config.json"):
        kept = (here / "base" / name).read_bytes() if name == "config.json" else None
        (here / "base" / name).unlink(missing_ok=True)
        (here / "base" / name).symlink_to(secret if kept is None else tmp_path / "config.json")
        if kept is not None:
            (tmp_path / "config.json").write_bytes(kept)
        refused(
            here, ValueError, rf"base: '.*/{name}' is a link out of the folder, to '.*', expected a file of the folder"
        )
        (here / "base" / name).unlink()
        if kept is not None:
            (here / "base" / name).write_bytes(kept)
    (here / "base" / "loop.json").symlink_to("loop.json")
    with pytest.raises(ValueError, match=r"loop\.json' cannot be followed"):
        merge_checkpoint(here / "base", here / "adapter", here / "out")


def test_a_cache_of_the_hub_is_followed(here: Path) -> None:
    """Its snapshots are links to blobs."""
    cache = here / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in (here / "base").iterdir():
        shutil.copy(path, cache / "blobs" / f"{path.name}.blob")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}.blob")
    merge_checkpoint(snapshot, here / "adapter", here / "out")
    merge_checkpoint(here / "base", here / "adapter", here / "other")
    assert content(here / "out") == content(here / "other")
    assert not any(path.is_symlink() for path in (here / "out").iterdir())


def test_pickles_are_neither_read_nor_executed(here: Path) -> None:
    """A pickle that creates a file where it is loaded."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(here / "executed"),)

    for path in (here / "base").glob("model*"):
        path.unlink()
    torch.save({"a": Evil()}, here / "base" / "pytorch_model.bin")
    refused(here, FileNotFoundError, r"has its weights in pytorch_model\.bin, a pickle, which could execute code")
    (here / "adapter" / WEIGHTS_FILE).unlink()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    torch.save({"a": Evil()}, here / "adapter" / "adapter_model.bin")
    shutil.rmtree(here / "base")
    save_base(llama(dtype=torch.float16), here / "base")
    refused(here, FileNotFoundError, r"which has no adapter_model\.safetensors; save it again with safe_serialization")
    assert not (here / "executed").exists()


def test_code_is_copied_and_not_imported(here: Path) -> None:
    (here / "base" / "modeling_mine.py").write_text("raise SystemExit('executed')\n")
    config = json.loads((here / "base" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (here / "base" / "config.json").write_text(json.dumps(config))
    merge_checkpoint(here / "base", here / "adapter", here / "out")
    assert (here / "out" / "modeling_mine.py").read_text() == "raise SystemExit('executed')\n"


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["A", "D", "scale"])
def test_numbers_that_are_not_finite(name: str, value: float, here: Path) -> None:
    write_tensors(here / "adapter", lambda state: state[f"{LAYER}.{name}"].view(-1)[:1].fill_(value))
    refused(here, ValueError, rf"{FILE}: {LAYER}\.{name}: got {value}, expected finite values")


def test_an_update_that_overflows(here: Path) -> None:
    write_tensors(here / "adapter", lambda state: state[f"{LAYER}.scale"].fill_(1e9))
    refused(
        here,
        ValueError,
        rf"{FILE}: {LAYER}\.weight: got .* which the update makes overflow torch\.float16.* in rows 0 to",
    )


def test_a_cast_that_overflows(here: Path) -> None:
    shutil.rmtree(here / "base")
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    save_base(model, here / "base")
    refused(here, ValueError, r"model\.norm\.weight has numbers beyond the range of", dtype=torch.float16)


def test_numbers_of_the_base_that_are_not_finite_stay(here: Path) -> None:
    shutil.rmtree(here / "base")
    model = llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 4] = torch.inf
        model.model.layers[0].self_attn.q_proj.weight[5, 6] = torch.nan
    save_base(model, here / "base")
    merge_checkpoint(here / "base", here / "adapter", here / "out", verify=True, dtype=torch.bfloat16)
    merged = tensors(here / "out")[f"{LAYER}.weight"]
    assert (~merged.isfinite()).nonzero().tolist() == [[3, 4], [5, 6]]


def change_settings(here: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Other settings for the adapter, which are read where the tensors' file has none."""
    path = here / "adapter" / "dual_lora_config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    save_file(load_file(here / "adapter" / WEIGHTS_FILE), here / "adapter" / WEIGHTS_FILE, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("A", torch.zeros(3, 31), r"C has shape \(2, 32\), expected \(2, 31\)"),
        ("B", torch.zeros(32), r"B has shape \(32,\), expected \(32, 3\)"),
        ("D", torch.zeros(32, 4), r"D has shape \(32, 4\), expected \(32, 2\)"),
        ("scale", torch.ones(1), r"scale has shape \(1,\), expected \(\)"),
        ("A", torch.zeros(3, 32, dtype=torch.int32), "A is of I32, expected BF16"),
    ],
)
def test_factors_that_do_not_fit_each_other(name: str, tensor: torch.Tensor, message: str, here: Path) -> None:
    write_tensors(here / "adapter", lambda state: state.update({f"{LAYER}.{name}": tensor}))
    refused(here, ValueError, rf"{FILE}: {LAYER}\.{message}")


def test_a_factor_that_is_missing(here: Path) -> None:
    write_tensors(here / "adapter", lambda state: state.pop(f"{LAYER}.C"))
    refused(here, ValueError, rf"{FILE}: the adapter has no {LAYER}\.C")


def test_another_models_adapter(here: Path, tmp_path: Path) -> None:
    other = save_base(gpt2(), tmp_path / "gpt2")
    shutil.rmtree(here / "adapter")
    save_adapter(other, here / "adapter")
    refused(
        here, ValueError, rf"{FILE}: base: '.*' has no transformer\.h\.0\.attn\.c_attn\.weight, .* another model's\?"
    )


def test_a_base_of_another_size(here: Path, tmp_path: Path) -> None:
    """GPT-2 with other numbers of features: both orientations are tried."""
    other = save_base(gpt2(), tmp_path / "gpt2")
    shutil.rmtree(here / "adapter")
    save_adapter(other, here / "adapter", target_modules=["c_attn"])
    shutil.rmtree(here / "base")
    model = gpt2()
    model.transformer.h[0].attn.c_attn.weight = torch.nn.Parameter(torch.zeros(32, 95))
    save_base(model, here / "base")
    refused(
        here, ValueError, r"h\.0\.attn\.c_attn\.weight in .* has shape \(32, 95\), expected \(96, 32\) by the adapter"
    )


def test_quantised_bases_are_merged_elsewhere(here: Path) -> None:
    config = json.loads((here / "base" / "config.json").read_text())
    (here / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    refused(here, ValueError, r"base: '.*' is quantised .*: load it, and the adapter, and merge_and_dequantize")
    (here / "base" / "config.json").write_text(json.dumps(config))
    path = here / "base" / index_of(here)["weight_map"][f"{LAYER}.weight"]
    state = load_file(path)
    save_file(state | {f"{LAYER}.weight": state[f"{LAYER}.weight"].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    refused(here, ValueError, rf"{LAYER}\.weight in .* is of F8_E4M3, expected BF16, F16, F32 or F64")


def test_square_weights_whose_orientation_nothing_tells(here: Path, tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "gpt2")
    shutil.rmtree(here / "adapter")
    save_adapter(base, here / "adapter", target_modules=["c_attn", "attn.c_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    shutil.rmtree(here / "base")
    shutil.copytree(base, here / "base")
    refused(here, ValueError, r"of transformer\.h\.0\.attn\.c_proj, which is square, nothing says how it is: .*'mine'")


def test_two_layers_of_one_weight(here: Path) -> None:
    """Names that may have a prefix more or less could mean one tensor twice."""

    def double(state: dict[str, torch.Tensor]) -> None:
        for name in ("A", "B", "C", "D", "scale"):
            state[f"wrapped.{LAYER}.{name}"] = state[f"{LAYER}.{name}"].clone()

    write_tensors(here / "adapter", double)
    change_settings(here, lambda document: document["layers"].update({f"wrapped.{LAYER}": document["layers"][LAYER]}))
    refused(here, ValueError, rf"has {LAYER}\.weight for both {LAYER} and wrapped\.{LAYER} of the adapter")


def test_folders_that_hold_none(here: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for base, error, message in (
        (
            "nowhere/at-all",
            FileNotFoundError,
            r"base: got 'nowhere/at-all', which is no folder, .*not a name on the Hub",
        ),
        (
            tmp_path / "empty",
            FileNotFoundError,
            r"which has neither model\.safetensors nor model\.safetensors\.index\.json",
        ),
    ):
        with pytest.raises(error, match=message):
            merge_checkpoint(base, here / "adapter", here / "out")
    with pytest.raises(FileNotFoundError, match="which has no dual_lora_model"):
        merge_checkpoint(here / "base", here / "base", here / "out")
    with pytest.raises(ValueError, match="adapters: got none"):
        merge_checkpoint(here / "base", [], here / "out")
    with pytest.raises(TypeError, match=r"dtype: got torch\.int8, expected one of torch\.bfloat16"):
        merge_checkpoint(here / "base", here / "adapter", here / "out", dtype=torch.int8)


# --- the folder that is written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["base", "base/out", "adapter/out", ".", "link"])
def test_folders_that_are_read_are_not_written(out: str, here: Path) -> None:
    if out == "link":
        (here / "link").symlink_to("new")
    before = content(here)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out: got .* expected a (folder apart from|new folder)"):
            merge_checkpoint(here / "base", here / "adapter", here / out, overwrite=overwrite)
    assert content(here) == before


def test_what_is_no_checkpoint_is_never_overwritten(here: Path, tmp_path: Path) -> None:
    """``--overwrite`` and a slip of the finger must not cost a home folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("mine")
    for out in ("home", "file"):
        with pytest.raises(ValueError, match=rf"out: got '.*/{out}', which holds no checkpoint"):
            merge_checkpoint(here / "base", here / "adapter", tmp_path / out, overwrite=True)
    (tmp_path / "empty").mkdir()
    merge_checkpoint(here / "base", here / "adapter", tmp_path / "empty", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_a_full_disk_is_told_before_anything_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    refused(here, OSError, r"out: got a disk with 1,000 bytes free, expected \d+,\d+ for what is missing")


@pytest.mark.parametrize("where", ["write", "flush", "others", "publish"])
def test_a_disk_that_fills_up_meanwhile(where: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "write": (shards.OutputFile, "_write_some"),
        "flush": (unfinished, "flush_file"),
        "others": (merge, "copy_files"),
        "publish": (unfinished, "flush_folder"),
    }[where]
    monkeypatch.setattr(*target, full)
    refused(here, OSError, "No space left on device")
    monkeypatch.undo()
    merge_checkpoint(here / "base", here / "adapter", here / "out")


def test_a_limit_on_files_sizes_that_the_system_keeps(here: Path) -> None:
    """The real thing: a write that the kernel refuses, in a process of its own."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    before = content(here)
    folders = [str(here / name) for name in ("base", "adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-m", "dual_lora_kernels.cli", "merge", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limited,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "dual-lora merge: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert content(here) == before
    assert {path.name for path in here.iterdir()} == {"base", "adapter"}


def test_two_merges_into_one_folder(here: Path) -> None:
    own = unfinished.Unfinished(here / "out", {"merge": "mine"})
    with pytest.raises(OSError, match=r"out: another process is merging into '.*/out'"):
        merge_checkpoint(here / "base", here / "adapter", here / "out")
    assert own.folder.is_dir()
    own.keep()
    merge_checkpoint(here / "base", here / "adapter", here / "out")
    assert {path.name for path in here.iterdir()} == {"base", "adapter", "out"}
