"""`SimpleTokenizer` of `open_clip.tokenizer`, imported without the rest of open_clip, whose imports take seconds.

Its instances cannot be pickled.
"""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

[_folder] = find_spec("open_clip").submodule_search_locations
_spec = spec_from_file_location(f"{__name__}.alone", Path(_folder) / "tokenizer.py")
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
SimpleTokenizer = _module.SimpleTokenizer
