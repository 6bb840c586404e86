"""The cases that the tests of this plugin share are importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
