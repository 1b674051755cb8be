"""What `make dist` has built is what it should be: pure Python, typed, complete, and of the version that the code has.

python tests/check_dist.py dist
"""

import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import magi_attention

ROOT = Path(__file__).parents[1]
VERSION = magi_attention.__version__


def check_wheel(wheel: Path) -> None:
    assert wheel.name == f"magi_attention-{VERSION}-py3-none-any.whl", f"{wheel.name} is not of Python alone"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"magi_attention-{VERSION}.dist-info"
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "magi_attention").rglob("*.py")}
    packed = {name for name in names if not name.startswith(info)}
    assert packed == source | {"magi_attention/py.typed"}, sorted(packed ^ (source | {"magi_attention/py.typed"}))
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0" and f"{info}/licenses/LICENSE" in names
    assert "magi-attention = magi_attention.cli:main" in entry_points


def check_source(archive: Path) -> None:
    top = f"magi_attention-{VERSION}"
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    needed = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "magi_attention/py.typed")
    assert not [name for name in needed if f"{top}/{name}" not in names]
    assert not [name for name in names if "__pycache__" in name or "/_build/" in name]


def main(folder: Path) -> None:
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_source(archive)
    print(f"{wheel.name} and {archive.name} are well")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
