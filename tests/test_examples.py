"""The examples run as they stand, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_ire_in_your_own_chain_learns_and_calls_a_share_of_gamma_flat():
    ended = subprocess.run(
        [sys.executable, "examples/ire_in_your_own_chain.py"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(r"loss (\S+)  flat (\S+)", ended.stdout)
    losses, shares = zip(*((float(loss), float(flat)) for loss, flat in rows), strict=True)
    assert losses[0] > 2 and losses[-1] < 0.3
    # Before start_step nothing is flat.
    assert shares[0] == 0 and all(share >= 0.599 for share in shares[1:])
