"""The package's logger: what was adapted and which backend runs reach the user without any set-up."""

from __future__ import annotations

import logging


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, unless the application has configured logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _respects_the_applications_level(record: logging.LogRecord) -> bool:
    """Propagation ignores the root logger's level, and this logger's own is INFO."""
    root = logging.getLogger()
    return not root.handlers or record.levelno >= root.level


def set_up() -> None:
    """Show the package's messages from INFO on, once, unless its logger has a handler already."""
    logger = logging.getLogger("dual_lora_kernels")
    if not logger.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
        logger.addFilter(_respects_the_applications_level)
        logger.setLevel(logging.INFO)
