"""Messages that the troubleshooting page quotes are those that the package raises."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ANYTHING = "\0"
BY_OTHERS = {
    "Duplicate GPU detected",
    "Received data size doesn't match expected size",
    "terminate called without an active exception",
}


def templates() -> list[str]:
    """Every string of the package, ``ANYTHING`` for what varies."""
    found = []
    for file in (ROOT / "magi_attention").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else ANYTHING for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages(page: str) -> list[str]:
    """What stands as code in the first column of the tables that are about messages."""
    messages = []
    for table in re.findall(r"^\| message[^\n]*\n\|---[^\n]*\n((?:\|[^\n]*\n)+)", page, re.MULTILINE):
        for row in table.splitlines():
            messages += re.findall(r"`([^`]+)`", row.split(" | ")[0])
    return messages


def is_raised(message: str, among: list[str]) -> bool:
    """Whether a template has in one line what is quoted, in which ``...`` stands for anything."""
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))))
    return any(pattern.search(template) for template in among)


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
TEMPLATES = templates()


@pytest.mark.parametrize("message", [m for m in quoted_messages(PAGE) if m not in BY_OTHERS])
def test_message_is_raised(message: str) -> None:
    assert is_raised(message, TEMPLATES)


def test_what_is_not_raised_is_seen() -> None:
    among = [f"{ANYTHING} must begin at 0, got {ANYTHING}[0] = {ANYTHING}"]
    assert is_raised("... must begin at 0, got ...", among)
    assert not is_raised("... must begin at 1, got ...", among)
    assert not is_raised("got ... must begin", among)
    assert len(quoted_messages(PAGE)) > 40
