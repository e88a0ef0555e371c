"""The README keeps its word: its snippets run, and what it names exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets_of_the_operator_and_of_the_layer():
    assert "ssm(" in "".join(SNIPPETS) and "Mamba3(" in "".join(SNIPPETS)


def test_every_path_in_the_tree_and_in_the_commands_exists():
    tree = README.split("```text\n")[1].split("```")[0]
    folder, named = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        named.append(name if not line.startswith(" ") else folder + name)
    named += re.findall(r"--config (\S+\.yaml)", README) + re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_results_in_the_table_are_the_committed_ones():
    """Each row of the results table shows the headline figure of the committed report that it links."""
    rows = re.findall(r"\| (-?[\d.]+) \| \[.*?\]\((results/[^)]+/report.md)\)", README)
    assert rows
    for figure, report in rows:
        committed = subprocess.run(["git", "show", f"HEAD:{report}"], cwd=ROOT, capture_output=True, text=True)
        if committed.returncode:
            pytest.skip("needs a git checkout, which knows the committed report from your own run's")
        assert f" {figure} +- " in committed.stdout, report
