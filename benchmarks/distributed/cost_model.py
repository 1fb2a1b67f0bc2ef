"""Predicts fine-tuning of Llama-3 models on 8 and 64 GPUs: ``python -m benchmarks.distributed.cost_model``; needs none.

Sums of bytes and operations on paper for Dual LoRA and LoRA at equal trainable parameters. GB are 1e9 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness import report

STEM = "cost_model"
PEAK = 989e12
"""FLOP/s of dense bf16 products: NVIDIA's data sheet of the H100 SXM."""
NVLINK, NETWORK = 450e9, 50e9
"""Bytes/s a GPU receives from its node (the data sheet's 900 GB/s both ways), from others (400 Gbit/s for each GPU)."""
CAPACITY = 80e9
"""Bytes. An 80 GB card has 85e9; the rest is for the CUDA context, NCCL's buffers and fragmentation."""
NODE = 8
"""GPUs of a node, as in a DGX H100."""
RANK_RATE = 60e12
"""FLOP/s of Dual LoRA's rank products in exact fp32, generating and contracting included: from the excess over the
three products in benchmarks/results/step_model_h200.md (14336 × 4096, 8192 tokens), itself a prediction."""
WORKSPACE = 32 * 2**20
"""Bytes of panels of W and H: the package's default, shared/DESIGN.md section 4."""
BF16, FP32 = 2, 4
STATE = 4 * FP32
"""Bytes for a trainable number: factor, gradient and Adam's two moments."""
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes (0.516) for a weight: 4 bits, an 8-bit scale for 64, an fp32 one for 256 scales (QLoRA, arXiv 2305.14314)."""
LOGIT = BF16 + 2 * FP32
"""Bytes for a logit of the chunk at hand: bf16, its fp32 copy and that one's gradient."""
ATTENTION_BACKWARD = 2.5
"""Backward / forward operations of attention: five products for two (FlashAttention-2, arXiv 2307.08691)."""
PREFETCHED = 2
"""Blocks that are gathered at a time: the one at work and the next (FSDP2's default)."""
CHECKPOINTED = 2
"""Forward passes of a block in a step when every block is checkpointed."""
METHODS = ("LoRA", "Dual LoRA")
GPUS = (8, 64)


@dataclass(frozen=True)
class Model:
    """A Llama's shape; `tied`: one matrix is embedding and head. Each linear layer has `hidden` on one side."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128256
    tied: bool = False

    @property
    def others(self) -> int:
        """The sides that are not `hidden` of q, k, v, o, gate, up and down, summed: tensor parallelism cuts these."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim + 3 * self.intermediate

    @property
    def weights(self) -> int:
        """Numbers in one block's seven linear layers."""
        return self.hidden * self.others

    @property
    def outside(self) -> int:
        """Numbers outside of the blocks: embedding, head, last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def numbers(self) -> int:
        """All of the base model's numbers."""
        return self.layers * (self.weights + 2 * self.hidden) + self.outside

    def replicated(self, rank: int) -> int:
        """One block's trainable numbers on the sides of `hidden`: partial sums as gradients in tensor parallelism."""
        return 7 * rank * self.hidden

    def factors(self, parts: int, rank: int) -> int:
        """One block's trainable numbers on a GPU, as many for LoRA's r as for r1 + r2."""
        return self.replicated(rank) + rank * self.others // parts

    def gathered(self, parts: int, rank: int) -> float:
        """Bytes of one block to gather: bf16 weights and norms, fp32 factors."""
        return (self.weights + 2 * self.hidden) / parts * BF16 + self.factors(parts, rank) * FP32


MODELS = {
    "1B": Model(2048, 16, 8192, 32, 8, 64, tied=True),
    "3B": Model(3072, 28, 8192, 24, 8, 128, tied=True),
    "8B": Model(4096, 32, 14336, 32, 8, 128),
    "70B": Model(8192, 80, 28672, 64, 8, 128),
    "405B": Model(16384, 126, 53248, 128, 8, 128),
}
"""From config.json of meta-llama's Llama-3.2-1B, Llama-3.2-3B, Meta-Llama-3-8B, Meta-Llama-3-70B, Llama-3.1-405B."""


@dataclass(frozen=True)
class Layout:
    """`parts`: GPUs of a tensor-parallel group; `sharded`: FSDP2 over the groups; `quantised`: NF4 base."""

    name: str
    parts: int = 1
    sharded: bool = False
    quantised: bool = False

    def data_parallel(self, gpus: int) -> tuple[int, int]:
        """(GPUs in a node, nodes) of the group that shares gradients, and weights where they are sharded."""
        return NODE // self.parts, gpus // NODE


LAYOUTS = (
    Layout("DDP"), Layout("FSDP2", sharded=True), Layout("TP 8 × FSDP2", parts=8, sharded=True),
    Layout("NF4 + DDP", quantised=True),
)  # fmt: skip
"""From the simplest on; the last is the alternative. On 8 GPUs the third is tensor parallelism alone."""


@dataclass(frozen=True)
class Settings:
    """`tokens` are a data-parallel rank's a step: of one GPU or one tensor-parallel group; `rank` is r, and r1 + r2.

    `efficiency` is the fraction of `PEAK` that products reach, `logits_chunk` the tokens whose logits live at a time.
    """

    tokens: int = 8192
    sequence: int = 4096
    rank: int = 32
    efficiency: float = 0.5
    logits_chunk: int = 1024


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU receives in a step, from its node and from other nodes."""

    nvlink: float = 0.0
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """Both links work at once."""
        return max(self.nvlink / NVLINK, self.network / NETWORK)


def gather(size: float, local: int, nodes: int) -> Traffic:
    """All-gather, or reduce-scatter, of `size` bytes by `local` GPUs of each of `nodes`.

    Two stages: a GPU fetches 1 / local of what other nodes have, then the node's GPUs exchange theirs.
    """
    return Traffic(size * (local - 1) / local, size / local * (nodes - 1) / nodes)


def all_reduce(size: float, local: int, nodes: int) -> Traffic:
    """Reduce-scatter, then all-gather, of `size` bytes."""
    return gather(2 * size, local, nodes)


def memory(model: Model, layout: Layout, gpus: int, method: str, settings: Settings) -> dict[str, float]:
    """Bytes on one GPU by kind; norms count as cut over a tensor-parallel group, though each GPU has them (MB)."""
    tokens, parts, hidden, heads = settings.tokens, layout.parts, model.hidden, model.heads + model.kv_heads
    local, nodes = layout.data_parallel(gpus)
    shards = local * nodes if layout.sharded else 1
    blocks, factors = model.layers * model.weights, model.factors(parts, settings.rank)
    gathered = 0.0
    if shards > 1:
        block = model.gathered(parts, settings.rank)
        gathered = max(PREFETCHED * block, block + model.outside / parts * BF16) + factors * FP32
    elif layout.quantised and method == "LoRA":
        gathered = hidden * model.intermediate * BF16
    linear = NF4 if layout.quantised else BF16
    return {
        "base": (blocks * linear + (model.numbers - blocks) * BF16) / parts / shards,
        "state": model.layers * factors * STATE / shards,
        "hidden": tokens * hidden * BF16 * model.layers,
        "block": tokens * BF16 * (6 * hidden + (4 * heads * model.head_dim + 7 * model.intermediate) / parts),
        "gathered": gathered,
        "logits": min(settings.logits_chunk, tokens) * model.vocabulary / parts * LOGIT,
        "workspace": WORKSPACE if method == "Dual LoRA" else 0,
    }


def total(model: Model, layout: Layout, gpus: int, method: str, settings: Settings) -> float:
    """Bytes on one GPU, an upper bound: a block's working set and the logits do not live at the same time."""
    return sum(memory(model, layout, gpus, method, settings).values())


def communication(model: Model, layout: Layout, gpus: int, settings: Settings) -> dict[str, Traffic]:
    """A step's traffic by kind, the same for both methods.

    Weights are gathered in forward and again in backward, once for recomputation and gradients together; embedding and
    head once. A block's all-reduces of activations: two a forward pass, two in backward; embedding and head one each.
    """
    local, nodes = layout.data_parallel(gpus)
    parts, rank, layers = layout.parts, settings.rank, model.layers
    gradients = layers * model.factors(parts, rank) * FP32
    all_reduces = layers * (2 * CHECKPOINTED + 2) + 2
    found = {
        "gradients": all_reduce(gradients, local, nodes),
        "activations": all_reduce(all_reduces * settings.tokens * model.hidden * BF16, parts, 1),
        "partial gradients": all_reduce(layers * model.replicated(rank) * FP32, parts, 1),
    }
    if not layout.sharded:
        return {"weights": Traffic(), **found}
    weights = 2 * layers * model.gathered(parts, rank) + model.outside / parts * BF16
    return {"weights": gather(weights, local, nodes), **found, "gradients": gather(gradients, local, nodes)}


def operations(
    model: Model, parts: int, method: str, settings: Settings, forwards: int = CHECKPOINTED
) -> tuple[float, float]:
    """(FLOP at the products' rate, FLOP of Dual LoRA's rank products) on one GPU in a step.

    A product has 2·tokens·N·K. LoRA has one a forward pass and G W; Dual LoRA also GᵀX. LoRA's factors take 2·tokens
    for each of their numbers in a forward pass and 4 in backward. Dual LoRA takes 2·(r1 + r2)·N·K to rebuild: once a
    forward pass, once for G W, once where H is contracted; and 4·(r1 + r2)·N·K for the contraction.
    """
    tokens, weights = settings.tokens, model.layers * model.weights / parts
    # Causal: half of two products of 2·tokens·sequence·(heads · head_dim).
    attention = model.layers * 2 * tokens * min(settings.sequence, tokens) * model.heads * model.head_dim / parts
    shared = attention * (forwards + ATTENTION_BACKWARD) + 4 * tokens * model.vocabulary * model.hidden / parts
    if method == "LoRA":
        factors = model.layers * model.factors(parts, settings.rank)
        return shared + 2 * tokens * weights * (forwards + 1) + (2 * forwards + 4) * tokens * factors, 0.0
    return shared + 2 * tokens * weights * (forwards + 2), (2 * (forwards + 2) + 4) * settings.rank * weights


def compute_seconds(model: Model, parts: int, method: str, settings: Settings, forwards: int = CHECKPOINTED) -> float:
    """Seconds of a step's products at the fraction of peak, and of rank products at their own rate."""
    products, rank_products = operations(model, parts, method, settings, forwards)
    return products / (settings.efficiency * PEAK) + rank_products / RANK_RATE


def communication_seconds(model: Model, layout: Layout, gpus: int, settings: Settings) -> float:
    """Seconds of a step's collectives, one kind after the other."""
    return sum(part.seconds for part in communication(model, layout, gpus, settings).values())


def balance(model: Model, layout: Layout, gpus: int, method: str, settings: Settings) -> int:
    """The tokens, in steps of 64, from which on compute takes as long as communication; 0 for more than 2**16."""
    for tokens in range(64, 2**16 + 1, 64):
        at = dataclasses.replace(settings, tokens=tokens)
        if communication_seconds(model, layout, gpus, at) <= compute_seconds(model, layout.parts, method, at):
            return tokens
    return 0


@dataclass(frozen=True)
class Row:
    """One layout on so many GPUs with one method: bytes, seconds, and ratios to LoRA's seconds on the same layout."""

    gpus: int
    layout: str
    method: str
    memory: dict[str, float]
    fits: bool
    traffic: dict[str, Traffic]
    compute: float
    communication: float
    hidden_ratio: float
    open_ratio: float
    tokens_per_second_per_gpu: float
    balance: int

    @property
    def name(self) -> str:
        """The tables' first cell."""
        return f"{self.gpus}, {self.layout}, {self.method}"


def row(model: Model, layout: Layout, gpus: int, method: str, settings: Settings) -> Row:
    """Communication is wholly hidden (the longer of it and compute counts) or not at all (their sum)."""
    traffic = communication(model, layout, gpus, settings)
    seconds = communication_seconds(model, layout, gpus, settings)
    compute, lora = (compute_seconds(model, layout.parts, name, settings) for name in (method, "LoRA"))
    found = memory(model, layout, gpus, method, settings)
    return Row(
        gpus, layout.name, method, found, sum(found.values()) <= CAPACITY, traffic, compute, seconds,
        hidden_ratio=max(compute, seconds) / max(lora, seconds), open_ratio=(compute + seconds) / (lora + seconds),
        tokens_per_second_per_gpu=settings.tokens / layout.parts / (compute + seconds),
        balance=balance(model, layout, gpus, method, settings),
    )  # fmt: skip


def rows(model: Model, settings: Settings) -> list[Row]:
    """Every number of GPUs, layout and method."""
    return [row(model, layout, gpus, method, settings) for gpus in GPUS for layout in LAYOUTS for method in METHODS]


def simplest(model: Model, gpus: int, settings: Settings) -> str:
    """The first layout with a bf16 base on which Dual LoRA fits, or none."""
    found = (at.name for at in LAYOUTS[:-1] if total(model, at, gpus, "Dual LoRA", settings) <= CAPACITY)
    return next(found, "none")


def largest(layout: Layout, gpus: int, settings: Settings) -> int:
    """The numbers of the deepest model with the 70B's blocks on which Dual LoRA fits."""
    models = (dataclasses.replace(MODELS["70B"], layers=layers) for layers in range(1, 1000))
    fitting = (at.numbers for at in models if total(at, layout, gpus, "Dual LoRA", settings) <= CAPACITY)
    return max(fitting, default=0)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e8 or size == 0 else f"{size / 1e9:.3f}"


def _fit_table(settings: Settings) -> str:
    cells = []
    for gpus in GPUS:
        for size, model in MODELS.items():
            totals = [total(model, layout, gpus, "Dual LoRA", settings) for layout in LAYOUTS]
            alternative = "yes" if totals[-1] <= CAPACITY else "no"
            cells.append([f"{gpus}, {size}", simplest(model, gpus, settings), alternative, *map(_gigabytes, totals)])
        most = [f"{largest(layout, gpus, settings) / 1e9:.0f}B" for layout in LAYOUTS]
        cells.append([f"{gpus}, most of 70B's blocks that fit", "", "", *most])
    return report.markdown_table(
        ("GPUs, size", "simplest", "NF4 + DDP fits", *(layout.name for layout in LAYOUTS)), cells
    )


def paragraphs(size: str, settings: Settings, found: Sequence[Row]) -> list[str]:
    """The report in Markdown."""
    tokens, rank, where = settings.tokens, settings.rank, "GPUs, layout, method"
    memory_cells = [
        [at.name, *map(_gigabytes, (*at.memory.values(), sum(at.memory.values()))), "yes" if at.fits else "no"]
        for at in found
    ]
    traffic_cells = [
        [f"{at.gpus}, {at.layout}", *(f"{_gigabytes(t.nvlink)} + {_gigabytes(t.network)}" for t in at.traffic.values()),
         f"{at.communication:.2f}"] for at in found if at.method == "LoRA"
    ]  # fmt: skip
    time_cells = [
        [at.name + ("" if at.fits else " (does not fit)"), f"{at.compute:.2f}", f"{at.communication:.2f}",
         f"{at.hidden_ratio:.2f}", f"{at.open_ratio:.2f}", f"{at.tokens_per_second_per_gpu:,.0f}", f"{at.balance:,}"]
        for at in found
    ]  # fmt: skip
    lora, dual = (compute_seconds(MODELS[size], 1, method, settings, forwards=1) for method in METHODS)
    return [
        f"# Dual LoRA and LoRA on many GPUs, Llama-3 {size}: predicted, nothing of this was run on GPUs",
        f"Sums on paper; GB are 1e9 bytes. H100 SXM: {PEAK / 1e12:.0f} TFLOP/s of bf16, of which products reach the "
        f"fraction {settings.efficiency:g}, {NVLINK / 1e9:.0f} GB/s within a node of {NODE}, {NETWORK / 1e9:.0f} GB/s "
        f"for each GPU between nodes, {CAPACITY / 1e9:.0f} GB. All seven linear layers of every block are adapted, "
        f"r = {rank} against r1 + r2 = {rank}, and every block is checkpointed. A data-parallel rank takes {tokens:,} "
        f"tokens a step in sequences of {min(settings.sequence, tokens):,}. It is one GPU or, with TP 8, eight, which "
        f"then have {tokens / NODE:,.0f} tokens each. On 8 GPUs TP 8 × FSDP2 is TP alone.",
        "## Memory of one GPU, GB",
        f"Base: bf16, or {NF4:.3f} bytes for a block's weight in NF4. State: factors, gradients and Adam in fp32, "
        f"{STATE} bytes. Hidden: 2·tokens·hidden bytes for each block, also on each GPU of a TP group. Working set of "
        "one block: 2·tokens·(6·hidden + (4·q + 4·kv + 7·intermediate) / TP) bytes. These are two norms' outputs, "
        "two residuals, two gradients; queries and keys before and after rotation, attention's output, values, and a "
        "gradient for each width; gate, up, SiLU, product and three gradients. Gathered: two blocks, or one with "
        "embedding and head, in bf16, with fp32 factors and one block's fp32 gradients; on NF4, LoRA's largest "
        f"dequantised weight. Logits: whole for {settings.logits_chunk:,} tokens, {LOGIT} bytes each. The total adds "
        "what does not live at the same time, so it is an upper bound.",
        report.markdown_table((where, *found[0].memory, "total", "fits"), memory_cells),
        "## Communication of a step, GB that one GPU receives from its node + from other nodes",
        "The same for both methods. Weights are gathered in forward and again in backward. A byte from another node "
        "crosses the network once for the eight GPUs of a node; both links work at once.",
        report.markdown_table(("GPUs, layout", "weights", "factors' gradients", "TP: activations",
                               "TP: partial gradients of factors", "s"), traffic_cells),
        "## Time of a step, s",
        "Dual LoRA takes four large products for LoRA's three; without checkpointing it is three for two, and the "
        f"ratio of compute {dual / lora:.2f}. Its rank products run at {RANK_RATE / 1e12:.0f} TFLOP/s, as "
        "step_model_h200.md predicts. Left out: NF4's dequantisation, Adam, norms and the like. Hidden: the longer of "
        "compute and communication; TP's all-reduces can hardly be hidden. Balance, in steps of 64: with fewer tokens "
        "a data-parallel rank's communication takes longer than its compute.",
        report.markdown_table((where, "compute", "communication", "× LoRA, hidden", "× LoRA, not hidden",
                               "tokens/s/GPU, not hidden", "balance, tokens"), time_cells),
        f"## The simplest layout that fits {CAPACITY / 1e9:.0f} GB",
        "DDP, then FSDP2, then FSDP2 with TP, on a bf16 base; NF4 + DDP as the alternative. Dual LoRA's GB, which are "
        "LoRA's but for workspace and dequantised weight.",
        _fit_table(settings),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed.cost_model", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="70B", help="of all but the last table (70B)")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help=f"({field.default})")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = vars(parser.parse_args(arguments))
    size, out = options.pop("model"), options.pop("out")
    settings = Settings(**options)
    found = rows(MODELS[size], settings)
    text = paragraphs(size, settings, found)
    print("\n\n".join(text))
    document = {
        "about": "predicted, nothing of this was run on GPUs", "model": size, "settings": options,
        "constants": dict(peak=PEAK, nvlink=NVLINK, network=NETWORK, capacity=CAPACITY, rank_rate=RANK_RATE, nf4=NF4),
        "rows": [dataclasses.asdict(at) for at in found],
        "simplest": {f"{gpus}, {name}": simplest(at, gpus, settings) for gpus in GPUS for name, at in MODELS.items()},
    }  # fmt: skip
    report.write(out, STEM, document, text)


if __name__ == "__main__":
    main()
