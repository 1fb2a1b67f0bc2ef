"""The passes as one kernel each: this module is the backend's `FusedPasses`."""

from .choice import preferred, serves
from .execute import token_product, weight_product

__all__ = ["preferred", "serves", "token_product", "weight_product"]
