"""Fine-tune a causal language model with Dual LoRA on any number of processes, of one node or several.

    torchrun --nproc-per-node 2 -m examples.distributed.finetune --layout fsdp

Without a GPU it runs on CPUs over gloo, with a small random Llama on the standard library's sources. It writes
checkpoints, and goes on from the newest one when it is started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraWarmup,
    apply_dual_lora,
    create_dual_lora_optimizer,
    save_dual_lora,
)
from dual_lora_kernels.distributed import (
    latest_checkpoint,
    load_checkpoint,
    parallelize_dual_lora,
    save_checkpoint,
    save_merged,
)

from ..demo.data import BYTE_VOCABULARY, BlockDataset, encode_bytes, load_encoder, target_corpus

LAYOUTS = ("ddp", "fsdp", "fsdp-tp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Meshes(NamedTuple):
    """The processes as a grid: those that hold different sequences, and those that share a layer."""

    data: DeviceMesh
    tensor: DeviceMesh | None


def main() -> None:
    """The command line."""
    options = _options()
    device = _join()
    if dist.get_rank() != 0:
        logging.getLogger("dual_lora_kernels").setLevel(logging.ERROR)  # once is enough
    try:
        meshes = _meshes(options, device)
        encode = encode_bytes if options.model is None else load_encoder(options.model, 0)[0]
        blocks = target_corpus(options.text, encode, options.sequence, 1).train
        torch.manual_seed(options.seed)
        model = _spread(_adapted(options), options.layout, meshes, device)
        _train(model, blocks, options, meshes, device)
        save_dual_lora(model, options.out / "adapter")
        if options.merge:
            save_merged(model, options.out / "merged")
    finally:
        dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples.distributed.finetune", description=__doc__.partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp", help="how the model is spread (default: fsdp)")
    parser.add_argument("--tensor-parallel", type=int, default=2, help="processes that share a layer, for fsdp-tp")
    parser.add_argument("--model", type=Path, help="folder of a transformers model; default: a small random Llama")
    parser.add_argument("--text", type=Path, help="text file to train on; default: the standard library's sources")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the base model (default: bfloat16)")
    parser.add_argument("--rank", type=int, default=8, help="of each of the two groups of factors")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a step, over all processes")
    parser.add_argument("--sequence", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merge", action="store_true", help="write the merged model as well")
    parser.add_argument("--out", type=Path, default=Path("results/distributed"), help="a folder that all nodes see")
    options = parser.parse_args()
    if options.merge and (options.out / "merged").exists():
        parser.error(f"--merge: {options.out / 'merged'} exists, expected none")
    return options


def _join() -> torch.device:
    """Join the other processes that torchrun has started, and take a device."""
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun: torchrun --nproc-per-node 2 -m examples.distributed.finetune")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def _meshes(options: argparse.Namespace, device: torch.device) -> Meshes:
    count, shared = dist.get_world_size(), options.tensor_parallel if options.layout == "fsdp-tp" else 1
    if shared < 1 or count % shared:
        raise SystemExit(f"--tensor-parallel: got {shared}, expected a divisor of the {count} processes")
    if options.batch_size % (count // shared):
        raise SystemExit(f"--batch-size: got {options.batch_size}, expected a multiple of {count // shared}")
    mesh = init_device_mesh(device.type, (count // shared, shared), mesh_dim_names=("data", "tensor"))
    return Meshes(mesh["data"], mesh["tensor"] if options.layout == "fsdp-tp" else None)


def _adapted(options: argparse.Namespace) -> nn.Module:
    """The adapted model, the same in every process: adapters come first, then what spreads the model."""
    dtype = DTYPES[options.dtype]
    if options.model is None:
        config = LlamaConfig(
            vocab_size=BYTE_VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, local_files_only=True)
    config = DualLoraConfig("all-linear", r1=options.rank, r2=options.rank, alpha=2.0 * options.rank)
    return apply_dual_lora(model.train(), config)


def _spread(model: nn.Module, layout: str, meshes: Meshes, device: torch.device) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model.to(device), device_ids=[device.index] if device.type == "cuda" else None)
    if meshes.tensor is not None:
        parallelize_dual_lora(model, meshes.tensor)
    for block in model.model.layers:  # type: ignore[union-attr]  # gathered one by one in each pass
        fully_shard(block, mesh=meshes.data)
    fully_shard(model, mesh=meshes.data)
    return model


def _train(
    model: nn.Module, blocks: BlockDataset, options: argparse.Namespace, meshes: Meshes, device: torch.device
) -> None:
    optimizer = create_dual_lora_optimizer(model, lr=options.learning_rate)
    warmup = DualLoraWarmup(model, max(1, options.steps // 5))
    checkpoints, first = options.out / "checkpoints", 0
    newest = latest_checkpoint(checkpoints)
    if newest is not None:
        first = load_checkpoint(newest, model, optimizer, {"warmup": warmup})
    with _progress(options.steps, first) as show:
        for step in range(first, options.steps):
            tokens = _own_sequences(blocks, step, options, meshes).to(device)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warmup.step()
            show(step + 1, _mean(loss), options.out)
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                save_checkpoint(checkpoints, step + 1, model, optimizer, {"warmup": warmup})


def _own_sequences(blocks: BlockDataset, step: int, options: argparse.Namespace, meshes: Meshes) -> torch.Tensor:
    """This process's part of a step's sequences, which depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    chosen = torch.randint(len(blocks), (options.batch_size,), generator=generator)
    return blocks.blocks[chosen.chunk(meshes.data.size())[meshes.data.get_local_rank()]]


def _mean(loss: torch.Tensor) -> float:
    total = loss.detach().float().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@contextmanager
def _progress(steps: int, first: int) -> Iterator[Any]:
    """A bar in the first process, which also writes the losses to ``losses.jsonl``."""
    if dist.get_rank() != 0:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("starting" if first == 0 else f"resuming at step {first}", total=steps, completed=first)

        def show(step: int, loss: float, out: Path) -> None:
            bar.update(task, completed=step, description=f"loss {loss:.4f}")
            out.mkdir(parents=True, exist_ok=True)
            with (out / "losses.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss}) + "\n")

        yield show


if __name__ == "__main__":
    main()
