"""The chat as it is where uvloop is not installed: `chat_on_asyncio.py PATH`."""

import runpy
import sys
from pathlib import Path

sys.modules["uvloop"] = None  # so that importing it fails
path = Path(sys.argv.pop(1)).resolve()
sys.path[0] = str(path.parent)
runpy.run_path(str(path), run_name="__main__")
