"""Dual LoRA fine-tuning (arXiv 2512.03402) without materialising the update.

ΔW = α/√(r1·r2) · ReLU(B A) ⊙ Sign(D C) adapts a frozen linear layer. `DualLoraLinear` stands in for ``nn.Linear``,
`apply_dual_lora` adapts a model, `merge_dual_lora` turns it back into plain layers. Start with the README; the formulas
are in `dual_lora_kernels.reference`.
"""

from ._logging import set_up
from ._version import __version__ as __version__
from .adapter_conversion import convert_adapter
from .adapter_state import dual_lora_state_dict
from .backends import available_backends
from .checkpoint import load_dual_lora, load_dual_lora_state_dict, save_dual_lora
from .checkpoint_merge import merge_checkpoint
from .column_sampling import draw_columns
from .config import DualLoraConfig
from .functional import dual_lora_delta, dual_lora_linear
from .linear import DualLoraLinear
from .merging import dual_lora_merge_, dual_lora_merged
from .model import apply_dual_lora, disable_adapter, merge_dual_lora, prepared, set_gradient_columns
from .monitoring import DualLoraMonitor, dual_lora_statistics
from .parameter_groups import create_dual_lora_optimizer, dual_lora_parameter_groups
from .quantised.layers import quantised_weight
from .quantised.weight import QuantisedWeight
from .quantised_linear import QuantisedDualLoraLinear
from .runtime_settings import (
    set_default_backend,
    set_strategy,
    set_workspace_bytes,
    settings,
    strategy,
    workspace_bytes,
)
from .warmup import DualLoraWarmup

set_up()

__all__ = [
    "DualLoraConfig",
    "DualLoraLinear",
    "DualLoraMonitor",
    "DualLoraWarmup",
    "QuantisedDualLoraLinear",
    "QuantisedWeight",
    "apply_dual_lora",
    "available_backends",
    "convert_adapter",
    "create_dual_lora_optimizer",
    "disable_adapter",
    "draw_columns",
    "dual_lora_delta",
    "dual_lora_linear",
    "dual_lora_merge_",
    "dual_lora_merged",
    "dual_lora_parameter_groups",
    "dual_lora_state_dict",
    "dual_lora_statistics",
    "load_dual_lora",
    "load_dual_lora_state_dict",
    "merge_checkpoint",
    "merge_dual_lora",
    "prepared",
    "quantised_weight",
    "save_dual_lora",
    "set_default_backend",
    "set_gradient_columns",
    "set_strategy",
    "set_workspace_bytes",
    "settings",
    "strategy",
    "workspace_bytes",
]
