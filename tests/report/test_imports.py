"""The report only reads records."""

import subprocess
import sys


def test_it_needs_no_torch() -> None:
    code = "import sys, batchnorm.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
