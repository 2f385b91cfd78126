"""The benchmarks are scripts beside each other, not a package."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "shapes")]
