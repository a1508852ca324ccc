"""The README states the size of each file, and this holds it to that."""

import re

import pytest
from conftest import ROOT

LIMITS = {"forget.py": 130, "model.py": 330, "data.py": 330, "train.py": 330, "eval.py": 500}


def lines(name):
    """Non-blank lines."""
    return sum(bool(line.strip()) for line in (ROOT / name).read_text().splitlines())


def test_the_readme_states_the_non_blank_lines_of_each_file():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| *`(\w+\.py)` *\| *(\d+) *\|", text, flags=re.MULTILINE))
    assert {name: int(n) for name, n in rows.items()} == {name: lines(name) for name in LIMITS}


@pytest.mark.parametrize("name", LIMITS)
def test_each_file_stays_within_its_budget(name):
    assert lines(name) <= LIMITS[name]
