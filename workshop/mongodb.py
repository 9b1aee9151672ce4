"""Find a real MongoDB server, for the notebook and the tests."""

import importlib.util
import shutil
import stat
from pathlib import Path


def find_mongod() -> str | None:
    """Find a MongoDB server: one on the PATH, or the one that pip can install."""
    if path := shutil.which("mongod"):
        return path
    spec = importlib.util.find_spec("fiftyone")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder, "db", "bin", "mongod")
        if path.exists():
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
            return str(path)
    return None
