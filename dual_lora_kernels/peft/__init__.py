"""Dual LoRA as a method of PEFT: import it, and use `DualLoraConfig` where ``LoraConfig`` was. ::

    from dual_lora_kernels.peft import DualLoraConfig

    model = get_peft_model(model, DualLoraConfig(r1=16, r2=16, alpha=32, target_modules="all-linear"))

Importing this module makes PEFT know the method, so it must be imported before an adapter is loaded. The computation is
`dual_lora_kernels.DualLoraLinear`'s.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..parameter_groups import create_dual_lora_optimizer
from ..peft_files import PEFT_PREFIX
from .config import DualLoraConfig
from .layer import DualLoraLayer, Linear
from .model import DualLoraModel
from .registration import PEFT_TYPE

if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=DualLoraConfig, model_cls=DualLoraModel, prefix=PEFT_PREFIX)

__all__ = ["DualLoraConfig", "DualLoraLayer", "DualLoraModel", "Linear", "create_dual_lora_optimizer"]
