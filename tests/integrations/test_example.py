"""The example runs and learns."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_packed.py"


def test_transformers_packed() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"2 masks, loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]
