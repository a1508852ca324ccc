"""The README states the size of each file, and this holds it to that."""

import re

import pytest
from conftest import ROOT

FILES = ["forget.py", "model.py", "data.py", "train.py", "eval.py"]


def lines(name):
    """Non-blank lines."""
    return sum(bool(line.strip()) for line in (ROOT / name).read_text().splitlines())


def test_the_readme_states_the_non_blank_lines_of_each_file():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| *`(\w+\.py)` *\| *([\d,]+) *\|", text, flags=re.MULTILINE))
    assert {name: int(n.replace(",", "")) for name, n in rows.items()} == {
        f: lines(f) for f in FILES
    }


@pytest.mark.parametrize("name", FILES)
def test_each_file_stays_within_its_budget(name):
    assert lines(name) <= (130 if name == "forget.py" else 330)


def test_all_files_together_stay_within_1200_lines():
    assert sum(map(lines, FILES)) <= 1200
