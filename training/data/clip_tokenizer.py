"""open_clip's tokenizer from its own file, without the rest of open_clip, whose imports take seconds in every process.

SimpleTokenizer    as `open_clip.tokenizer` has it; instances do not travel to other processes
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def _load() -> ModuleType:
    """Load the file alone: it imports nothing of its package."""
    [folder] = find_spec("open_clip").submodule_search_locations
    spec = spec_from_file_location(f"{__name__}.alone", Path(folder) / "tokenizer.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SimpleTokenizer = _load().SimpleTokenizer
