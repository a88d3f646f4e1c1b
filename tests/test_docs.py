"""Every Python and shell block of the guides, in order, one directory per page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("peft")

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what the console script does, from this checkout
COMMAND = f'hq-inductor() {{ "{sys.executable}" -m hq_inductor.cli "$@"; }}\nset -euo pipefail\n'


def pages():
    return sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])
    namespace = {"__name__": page.stem}
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
        elif language == "bash":
            result = subprocess.run(["bash", "-c", COMMAND + text], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
            assert result.returncode == 0, result.stderr


def test_pages_have_blocks_of_known_kinds_and_are_linked():
    index = (DOCS / "README.md").read_text()
    for page in pages():
        kinds = [language for language, _ in BLOCK.findall(page.read_text())]
        assert page.name == "README.md" or (kinds.count("python") and f"({page.name})" in index)
        assert set(kinds) <= {"python", "bash", "text"}


def test_links_lead_somewhere():
    for page in pages():
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), target
        for example in re.findall(r"examples/\w+\.py", page.read_text()):
            assert (DOCS.parent / example).exists(), example
