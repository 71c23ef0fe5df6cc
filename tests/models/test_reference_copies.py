"""The reference numbers in the checkout equal those of the whole set, where that is available."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.clip_vip import REFERENCE, reference


def test_the_copies_take_five_megabytes_at_most() -> None:
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()) <= 5_000_000


def test_every_copied_or_drawn_number_is_in_the_whole_set(pytestconfig: pytest.Config) -> None:
    whole = pytestconfig.rootpath.parent / "shared" / "reference"
    if not whole.is_dir():
        pytest.skip(f"the whole set of reference numbers is not beside the checkout: {whole}")
    for path in whole.glob("*/*"):
        copy = reference(*path.relative_to(whole).parts)
        if path.suffix == ".json":
            assert copy.read_bytes() == path.read_bytes(), path.name
            continue
        known = load_file(path)
        for name, tensor in load_file(copy).items():
            assert tensor.dtype == known[name].dtype
            expected = known[name][: len(tensor)] if "/vision_hidden/" in name else known[name]
            assert torch.equal(tensor, expected), (path.name, name)
