"""Docstrings say what a function does: none opens with a question word. Ruff's D401 checks the imperative."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("clipmill", "pipeline", "captioning", "shards", "training", "bench", "docs")
OPENERS = re.compile(r"(What|Whether|How|Of|Where|Which|Who|When)\b")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_docstring_opens_with_a_question_word(package):
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node) or ""
                if OPENERS.match(docstring):
                    found.append(f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}")
    assert found == []
