"""What all tests share. The folder's own modules are found by their names."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
