"""The chat as it ships, on uvloop: `chat_on_uvloop.py PATH` runs the chat.py there."""

import asyncio
import runpy
import sys
from pathlib import Path

import uvloop

asyncio.new_event_loop = uvloop.new_event_loop  # the one that web.run_app takes
path = Path(sys.argv.pop(1)).resolve()
sys.path[0] = str(path.parent)
runpy.run_path(str(path), run_name="__main__")
