from __future__ import annotations

import subprocess
import sys


def test_importing_the_kit_does_not_import_lightning():
    check = "import sys, qsm_rl; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
