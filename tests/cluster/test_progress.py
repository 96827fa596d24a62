"""What starts beside every group of workers starts fast."""

import subprocess
import sys


def test_the_progress_actor_imports_no_torch():
    code = "import cluster.progress, sys; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
