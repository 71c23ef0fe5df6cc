"""`docs/reliability.md` names tests that exist, and `docs/queries.md` shows the queries of `docs/queries.sql`."""

import re
from fnmatch import filter as matching
from pathlib import Path

from bench.sql import read_queries

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_the_page_names_exists():
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    files = re.findall(r"\btest_[\w*]+\.py\b", PAGE)
    assert [name for name in files if not matching(tests, name)] == []
    names = re.findall(r"\btest_\w+\b", re.sub(r"\btest_[\w*]+\.py\b", "", PAGE))
    assert len(names) > 20
    everything = "\n".join(tests.values())
    assert [name for name in names if f"def {name}(" not in everything] == []


def test_every_line_of_a_table_of_tests_names_one():
    tables = [block.splitlines() for block in PAGE.split("\n\n") if block.startswith("| ")]
    promises = [line for heading, _, *lines in tables if heading.endswith("| test |") for line in lines]
    assert len(promises) > 60
    assert [line for line in promises if "test_" not in line] == []


def test_the_page_of_queries_shows_the_queries_of_the_file():
    page = (ROOT / "docs" / "queries.md").read_text()
    assert [title for title, sql in read_queries() if f"**{title}**\n\n```sql\n{sql};\n```" not in page] == []
