"""A short kill storm; the long one is `python tests/storm.py --kills 200`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).with_name("storm.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the storm forks its processes")
def test_a_run_killed_repeatedly_ends_bit_identical():
    command = [sys.executable, str(STORM), "--kills", "3", "--seed", "5", "--variants", "adamw"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "kills survived of kills tried: 3 of 3" in done.stdout
