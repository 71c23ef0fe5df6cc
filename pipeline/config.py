"""What every settings model shares. Each stage owns its settings class; `pipeline.settings` joins them.

Modules that define settings import nothing heavy at the top (no av, torch, ray), so that `clipmill --help` stays quick.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are immutable, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def fingerprint(self) -> str:
        """Hash of every setting that can change what the stage writes (operational ones left out)."""
        return digest(self.model_dump(mode="json", exclude=self._operational()))

    @classmethod
    def _operational(cls) -> set[str]:
        return {
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
        }


def operational(default: Any, **kwargs: Any) -> Any:
    """A setting that changes how fast or how safely work is done, never its result: not part of the fingerprint."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def digest(value: Any) -> str:
    """Stable 16-hex-digit hash of any JSON-able value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
