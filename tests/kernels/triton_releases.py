"""The releases of Triton that kernels are compiled under, and whether what they make keeps to the registers.

``python -m tests.kernels.triton_releases ENGINE`` prints the numbers that the engine's test should note.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.kernels.compile_kernels import CASES, Compiled

RELEASES = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes that a program may have on every GPU whose compute capability begins with the same digit."""

Numbers = dict[tuple[str, str], tuple[int, ...]]
"""For a case and a kernel, a number for each release."""

TRITON_ENGINE_ELSEWHERE = ("sm_90, 128", "sm_90, 96, fp16, softcap, layered")
"""What is compiled of the triton engine but under the first release: it uses nothing that is young in Triton."""

each_release = pytest.mark.parametrize("release", RELEASES)


def compile_under(release: str, engine: str, cache: Path) -> list[Compiled]:
    """What a release makes of an engine's kernels, in a process that finds it before the one that is installed."""
    if release == "3.9.0" and sys.version_info < (3, 11):
        pytest.skip("Triton 3.9 is not built for Python 3.10")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    if release != version("triton"):
        folder = Path(sys.prefix) / f"triton-{release}"
        assert (folder / "triton").is_dir(), f"there is no Triton {release} in {folder}: make tritons"
        environment["PYTHONPATH"] = str(folder)
    cases = CASES[engine] if engine == "hopper" or release == RELEASES[0] else TRITON_ENGINE_ELSEWHERE
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_kernels", release, engine, *cases],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def check(compiled: list[Compiled], release: str, engine: str, spills: Numbers) -> None:
    """Compare with the shared memory of a GPU, and with how many bytes are noted to be spilled."""
    nth = RELEASES.index(release)
    stale = spills.keys() - {(x.case, x.kernel) for x in compiled}
    assert nth or not stale, f"noted, but not compiled: {stale}"
    for x in compiled:
        kernel, largest = f"{x.case}: {x.kernel}", SHARED_MEMORY[CASES[engine][x.case].capability]
        noted = spills.get((x.case, x.kernel), (0,) * len(RELEASES))[nth]
        assert x.spilled <= noted, f"{kernel} spills {x.spilled} bytes, {noted} are noted"
        assert not x.complaints, f"{kernel}: {x.complaints}"
        assert x.shared <= largest, f"{kernel} takes {x.shared} bytes of shared memory, of {largest}"


def measure_spills(engine: str) -> Numbers:
    """What a test should note, without the rows that have only zeros; what is not compiled is 0."""
    spills: dict[tuple[str, str], list[int]] = {}
    for nth, release in enumerate(RELEASES):
        with tempfile.TemporaryDirectory() as cache:
            for x in compile_under(release, engine, Path(cache)):
                spills.setdefault((x.case, x.kernel), [0] * len(RELEASES))[nth] = x.spilled
    return {name: tuple(numbers) for name, numbers in spills.items() if any(numbers)}


if __name__ == "__main__":
    for (case, kernel), numbers in measure_spills(sys.argv[1]).items():
        print(f"    ({json.dumps(case)}, {json.dumps(kernel)}): {numbers},")
