"""Fill a stick with wheels, for rooms whose network can't install anything.

    python -m workshop.stick wheels                 for every system
    python -m workshop.stick wheels windows 3.13    for one of them

On each machine, without a network:

    python -m pip install --no-index --find-links wheels -r workshop/requirements.txt
"""

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
VERSIONS = "3.11", "3.12", "3.13", "3.14"
# pip finds another system's files, but it answers conditions like `os_name == "nt"` for
# this machine. So what only one system, or only Python 3.11, needs is named here.
OLDER = ["overrides"]
SYSTEMS = {
    "windows": (["win_amd64"], ["colorama", "pywin32", "pywinpty", "tzdata"]),
    "mac": (["macosx_12_0_arm64"], ["appnope"]),
    "mac-intel": (["macosx_12_0_x86_64"], ["appnope"]),
    "linux": (["manylinux_2_28_x86_64", "manylinux2014_x86_64"], ["pexpect"]),
    "linux-arm": (["manylinux_2_28_aarch64", "manylinux2014_aarch64"], ["pexpect"]),
}


def fill(folder: str, system: str, version: str) -> None:
    """Download what one system needs. Raises CalledProcessError."""
    platforms, more = SYSTEMS[system]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "-d", folder]
    command += ["--only-binary", ":all:", "--python-version", version]
    for platform in platforms:
        command += ["--platform", platform]
    subprocess.run([*command, "-r", str(REQUIREMENTS), *OLDER, *more], check=True)
    size = sum(file.stat().st_size for file in Path(folder).iterdir()) >> 20
    print(f"{system} {version}: done; {size} MiB in {folder}", flush=True)


def main(folder: str, system: str = "", version: str = "") -> None:
    if system and system not in SYSTEMS:
        sys.exit(f"{system} is none of {', '.join(SYSTEMS)}")
    for name in [system] if system else SYSTEMS:
        for number in [version] if version else VERSIONS:
            fill(folder, name, number)


if __name__ == "__main__":
    main(*sys.argv[1:])
