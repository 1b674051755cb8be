"""The documentation is true: its names exist, its examples run and print what they say, its pictures are today's."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.torchrun import torchrun

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "_build" not in p.parts)
FENCE = re.compile(r"^```(?P<language>\S*)[^\n`]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A ```python block. A ```text block that follows it, with at most a ```bash block between, is what it prints."""

    line: int
    source: str
    output: str | None


def examples(page: str) -> Iterator[Example]:
    fences = list(FENCE.finditer(page))
    for n, fence in enumerate(fences):
        if fence["language"] != "python":
            continue
        behind = next((f for f in fences[n + 1 :] if f["language"] != "bash"), None)
        output = behind["body"] if behind is not None and behind["language"] == "text" else None
        yield Example(page.count("\n", 0, fence.start()) + 2, fence["body"], output)


def run_here(example: Example, page: Path, names: dict[str, object]) -> str:
    """Run an example in this process, with the names of the examples before it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (example.line - 1) + example.source, str(page), "exec"), names)
    return printed.getvalue()


def run_script(example: Example, folder: Path) -> str:
    """Run an example that is a program of its own, over two processes."""
    script = folder / "train.py"
    script.write_text(example.source)
    return torchrun(script)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(examples(p.read_text()))], ids=lambda p: str(p.relative_to(ROOT))
)
@pytest.mark.usefixtures("local_group")
def test_examples_run_and_print_what_they_say(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for example in examples(page.read_text()):
        is_script = "init_process_group" in example.source
        printed = run_script(example, tmp_path) if is_script else run_here(example, page, names)
        if example.output is not None:
            assert printed == example.output, f"{page.name}, line {example.line}"


def test_an_untrue_output_is_seen() -> None:
    (example,) = examples("text\n```python\nprint(1 + 1)\n```\nprints\n```text\n3\n```\n")
    assert example.line == 3
    assert run_here(example, Path("page.md"), {}) == "2\n" != example.output


def test_api_page_names_exist() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    entries = re.findall(r"^\.\. (currentmodule|autofunction):: (\S+)$", page, re.MULTILINE)
    module, found = "", []
    for directive, name in entries:
        if directive == "currentmodule":
            module = name
        else:
            assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
            found.append(name)
    assert len(found) == 11


def test_pictures_are_what_the_library_draws(tmp_path: Path) -> None:
    script = ROOT / "docs" / "make_pictures.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, timeout=120)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "docs" / "pictures").iterdir()}
    assert drawn == committed, "run `make docs` and commit docs/pictures"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pictures_and_pages_that_a_page_names_exist(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", FENCE.sub("", page.read_text()))
    assert [target for target in targets if not (page.parent / target).exists()] == []
