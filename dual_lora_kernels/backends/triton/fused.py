"""The passes as one kernel each: this module is the backend's `FusedPasses`."""

from .choice import preferred, why_not
from .execute import token_product, weight_product

__all__ = ["preferred", "token_product", "weight_product", "why_not"]
