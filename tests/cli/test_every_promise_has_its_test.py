"""What `docs/reliability.md` promises names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    files, names = re.findall(r"\btest_\w+\.py\b", page), re.findall(r"\btest_\w+\b(?!\.py)", page)
    assert len(names) > 20
    assert [name for name in files if name not in tests] == []
    everything = "\n".join(tests.values())
    assert [name for name in names if f"def {name}(" not in everything] == []


def test_every_line_of_a_table_of_tests_names_one():
    page = (ROOT / "docs" / "reliability.md").read_text()
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("| ")]
    promises = [line for heading, _, *lines in tables if heading.endswith("| test |") for line in lines]
    assert len(promises) > 30
    assert [line for line in promises if "test_" not in line] == []
