"""What `docs/reliability.md` promises names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    files, names = re.findall(r"\btest_\w+\.py\b", page), re.findall(r"\btest_\w+\b(?!\.py)", page)
    assert len(names) > 20
    assert [name for name in files if name not in tests] == []
    everything = "\n".join(tests.values())
    assert [name for name in names if f"def {name}(" not in everything] == []


def test_every_line_of_a_table_names_one():
    page = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    promises = [line for line in page if line.startswith("| ") and not line.startswith("| promise")]
    assert [line for line in promises if "test_" not in line] == []
