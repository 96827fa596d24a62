"""What starts beside every group of workers starts fast."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    ["cluster.progress", "cluster.process_group", "cluster.elasticity", "cluster.restarts"],
)
def test_what_the_actors_beside_a_group_import_holds_no_torch(module):
    code = f"import {module}, sys; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
