"""A model's checkpoint on disk, as transformers writes it: shards that are read piece by piece, and layers' weights.

Nothing in the folder is executed or unpickled, and no file outside of it is named by one in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backends import PANEL_UNIT
from .safetensors_file import DTYPES, SafetensorsFile, StoredTensor, as_tensor
from .validation import SUPPORTED_DTYPES

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_LARGEST_JSON = 100_000_000
"""Bytes. The index of a model with 100,000 tensors has some 10 MB."""
_CONV1D_MODELS = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
"""The model types whose numbered blocks have Conv1D layers alone. It matters for square weights: no shape tells."""
_INTERCHANGEABLE = {"model", "language_model", "text_model"}
"""Parts of names that transformers' versions put in other places: ``language_model.model.layers`` is what is written of
the module ``model.language_model.layers``."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "embeddings.weight")
"""The ends of input embeddings' names."""
_HEADS = ("lm_head", "embed_out", "output")


class StoredWeight(NamedTuple):
    """A linear layer's weight W0 [N, K] in a checkpoint.

    Attributes:
        file, name: where it is, and the tensor's name there.
        shape: (out_features, in_features) = (N, K).
        transposed: it is stored as [in_features, out_features], as transformers' Conv1D has it.
        is_tied: it is the input embedding, which an output head without a weight of its own uses.
    """

    file: SafetensorsFile
    name: str
    shape: tuple[int, int]
    transposed: bool
    is_tied: bool = False

    @property
    def entry(self) -> StoredTensor:
        """Where its bytes are."""
        return self.file.tensors[self.name]

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return DTYPES[self.entry.dtype]

    def blocks(self, budget: int) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """((first row, first column), W0's block [n, k]): all of W0, in blocks of at most `budget` bytes.

        A block is a view; the next one takes its memory. At least one stored row is read, whatever its bytes.
        """
        columns = self.entry.shape[1]
        buffer = bytearray(piece_rows(self.entry, budget) * columns * self.dtype.itemsize)
        for start, stop, view in pieces(self.entry, budget, memoryview(buffer)):
            self.file.read_into(view, self.entry.start + start * columns * self.dtype.itemsize)
            stored = as_tensor(view, self.dtype).view(stop - start, columns)
            yield ((0, start), stored.t()) if self.transposed else ((start, 0), stored)


def piece_rows(entry: StoredTensor, budget: int) -> int:
    """How many rows of a stored matrix are read at a time: as `budget` bytes hold, in whole panels if it can."""
    row = max(1, entry.nbytes // max(1, entry.shape[0]))
    rows = max(1, budget // row)
    return min(rows // PANEL_UNIT * PANEL_UNIT or rows, max(1, entry.shape[0]))


def pieces(entry: StoredTensor, budget: int, buffer: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(first row, end, as many of the buffer's bytes) for each piece of a stored matrix."""
    rows = entry.shape[0]
    row = entry.nbytes // max(1, rows)
    step = piece_rows(entry, budget)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, stop, buffer[: (stop - start) * row]


class BaseCheckpoint:
    """An open checkpoint: `config.json` and one or several safetensors files.

    Attributes:
        folder: as given.
        config: what its config.json says; {} without one.
        index: what its index file says; None for a single file.
        files: the open shards by name, in the index's order.

    Raises:
        FileNotFoundError: there is no checkpoint in `folder`, or a shard of it is missing.
        ValueError: the index or a shard is damaged or hostile, or they do not fit each other; the model is quantised.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_json(self.folder / CONFIG_FILE) if (self.folder / CONFIG_FILE).exists() else {}
        self.index = None if (self.folder / WEIGHTS_FILE).exists() else self._read_index()
        names = [WEIGHTS_FILE] if self.index is None else list(dict.fromkeys(self.index["weight_map"].values()))
        self.files: dict[str, SafetensorsFile] = {}
        try:
            for name in names:
                self.files[name] = SafetensorsFile(self.folder / name)
            self.tensors = self._tensors()
        except BaseException:
            self.close()
            raise

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX_FILE
        if not path.exists():
            raise FileNotFoundError(f"base: got {str(self.folder)!r}, {self._what_it_is()}")
        index = _read_json(path)
        weights = index.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ValueError(f"{str(path)!r} has no weight_map from names of tensors to files")
        for tensor, file in weights.items():
            if (
                not isinstance(file, str)
                or not file.endswith(".safetensors")
                or Path(file).name != file
                or "\\" in file
            ):
                raise ValueError(
                    f"{str(path)!r} says that {tensor} is in {file!r}, expected the name of a .safetensors file"
                )
        return index

    def _what_it_is(self) -> str:
        if not self.folder.is_dir():
            return "which is no folder, expected one with config.json and safetensors files (not a name on the Hub)"
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            return (
                f"which has its weights in {pickles[0]}, a pickle, which could execute code: it is not read. Expected "
                "safetensors: load the model with transformers where you trust it, and save it by save_pretrained"
            )
        return f"which has neither {WEIGHTS_FILE} nor {INDEX_FILE}, expected a model that save_pretrained wrote"

    def _tensors(self) -> dict[str, SafetensorsFile]:
        found: dict[str, SafetensorsFile] = {}
        weights = {} if self.index is None else self.index["weight_map"]
        for name, file in self.files.items():
            for tensor in file.tensors:
                if weights.get(tensor, name) != name or tensor in found:
                    others = [other for other, its in self.files.items() if other != name and tensor in its.tensors]
                    raise ValueError(
                        f"{tensor} is in {str(file.path)!r} and, or by {INDEX_FILE}, in "
                        f"{others[0] if others else weights[tensor]}: expected it once"
                    )
                found[tensor] = file
        for tensor, name in weights.items():
            if tensor not in self.files[name].tensors:
                raise ValueError(f"{str(self.files[name].path)!r} has no {tensor}, which {INDEX_FILE} says it has")
        return found

    def layer(self, name: str, shape: tuple[int, int]) -> StoredWeight:
        """Where the weight [out_features, in_features] = `shape` of the model's layer `name` is.

        Raises ValueError where the checkpoint has none that fits, or several; or one that is quantised.
        """
        if "quantization_config" in self.config:
            raise ValueError(
                f"base: {str(self.folder)!r} is quantised (quantization_config in {CONFIG_FILE}), expected a model in "
                "bf16, fp16 or fp32: load it, and the adapter, and merge_and_dequantize() or merge_dual_lora()"
            )
        tensor = self.find(f"{name}.weight")
        is_tied = tensor is None and is_head(name)
        if is_tied:
            tensor = self._embedding(shape)
        if tensor is None:
            raise ValueError(
                f"base: {str(self.folder)!r} has no {name}.weight, which the adapter is for: is it another model's? "
                "Where transformers ties or renames that weight, merge in memory: merge_dual_lora()"
            )
        file = self.tensors[tensor]
        weight = StoredWeight(file, tensor, shape, self._is_transposed(name, tensor, shape), is_tied)
        if DTYPES.get(weight.entry.dtype) not in SUPPORTED_DTYPES:
            raise ValueError(
                f"{tensor} in {str(file.path)!r} is of {weight.entry.dtype}, expected BF16, F16, F32 or F64: quantised "
                "weights are merged in memory"
            )
        return weight

    def find(self, own: str) -> str | None:
        """The name in the checkpoint of the model's tensor `own`. None where there is none, ValueError for several.

        Names may have a prefix more or less, as those of a backbone saved by itself have.
        """
        if own in self.tensors:
            return own
        found = [name for name in self.tensors if _is_prefixed(name, own) or _normal(name) == _normal(own)]
        if len(found) > 1:
            raise ValueError(
                f"base: {str(self.folder)!r} has no {own}, and more than one that could be meant: {', '.join(found)}"
            )
        return found[0] if found else None

    def _embedding(self, shape: tuple[int, int]) -> str | None:
        found = [
            name
            for name, file in self.tensors.items()
            if name.endswith(EMBEDDINGS) and file.tensors[name].shape == shape
        ]
        return found[0] if len(found) == 1 else None

    def _is_transposed(self, layer: str, tensor: str, shape: tuple[int, int]) -> bool:
        stored = self.tensors[tensor].tensors[tensor].shape
        if stored not in (shape, shape[::-1]):
            raise ValueError(
                f"{tensor} in {str(self.tensors[tensor].path)!r} has shape {stored}, expected {shape} by the adapter's "
                "factors: it is another model's"
            )
        if shape[0] != shape[1]:
            return stored != shape
        is_in_block = any(part.isdigit() for part in layer.split("."))
        return self.config.get("model_type") in _CONV1D_MODELS and is_in_block

    def layers(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, StoredWeight]:
        """`layer` of each; ValueError too where two have one weight, or nothing says how a square one is stored."""
        found = {name: self.layer(name, shape) for name, shape in shapes.items()}
        (tensor, count), *_ = Counter(weight.name for weight in found.values()).most_common(1) or [("", 0)]
        if count > 1:
            both = [name for name, weight in found.items() if weight.name == tensor]
            raise ValueError(f"base: {str(self.folder)!r} has {tensor} for both {both[0]} and {both[1]} of the adapter")
        transposed = [name for name, weight in found.items() if weight.transposed]
        square = [name for name, weight in found.items() if weight.shape[0] == weight.shape[1]]
        if transposed and square and self.config.get("model_type") not in _CONV1D_MODELS:
            raise ValueError(
                f"base: {transposed[0]} is stored [in_features, out_features], and of {square[0]}, which is square, "
                f"nothing says how it is: the model_type {self.config.get('model_type')!r} is not known for Conv1D"
            )
        return found

    def close(self) -> None:
        """Close the shards."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> BaseCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_head(name: str) -> bool:
    """Whether a layer is an output head by its name: transformers may tie it to the input embedding."""
    return name.rpartition(".")[2] in _HEADS


def _is_prefixed(one: str, other: str) -> bool:
    """Whether one of two names is the other's end after a dot, and more than the tensor's own name."""
    return (one.endswith(f".{other}") and "." in other) or (other.endswith(f".{one}") and "." in one)


def _normal(name: str) -> tuple[str, ...]:
    """A name's parts but for those that may stand elsewhere."""
    return tuple(part for part in name.split(".") if part not in _INTERCHANGEABLE)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # reading a pipe, or a device, would not end
        raise ValueError(f"{str(path)!r} is no regular file, expected JSON")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size:,} bytes, expected {_LARGEST_JSON:,} at most")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} is a {type(content).__name__}, expected an object")
    return content
