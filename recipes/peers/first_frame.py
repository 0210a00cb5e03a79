"""Prints as JSON the seconds from starting recipes/mujoco_qsm.py to its first frame; run by recipes/benchmark.py."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    recipe = Path(__file__).parents[1] / "mujoco_qsm.py"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = ["--compile", "false", "--log_every", "1", "--run_dir", str(run)]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(recipe), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (run / "metrics.csv").exists():  # its first row is that of the first frame
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.poll() is not None:
            raise SystemExit(f"the recipe ended with exit code {process.returncode} before its first frame")
        process.kill()
        process.wait()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"seconds": seconds, "processor_seconds": spent.ru_utime + spent.ru_stime}))


if __name__ == "__main__":
    main()
