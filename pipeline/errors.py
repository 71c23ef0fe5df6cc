"""The errors' old place, which captioner plug-ins written for 0.1.0 import: editing them would redo their captions."""

from clipmill.base.errors import ItemError, UserError

__all__ = ["ItemError", "UserError"]
