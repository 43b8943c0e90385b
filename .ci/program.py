"""Build the program that needs no Python, for the system that this runs on: `program.py WHEEL OUT`.

OUT gets the archive that users unpack, a zip for Windows and else a tar.gz, and its SBOM. Needs Python and pip alone:
packages and tools are installed into environments of their own, in the locked versions.
"""

import json
import os
import platform
import shutil
import ssl
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINDOWS = sys.platform == "win32"
PLACES = "import sysconfig; print(sysconfig.get_path('purelib'), sysconfig.get_path('stdlib'), sep='\\n')"


def run(*words: str | Path, **more: str) -> str:
    """Run a command, with ``more`` in its environment; return what it prints."""
    return subprocess.run(words, check=True, env=os.environ | more, stdout=subprocess.PIPE, text=True).stdout


def environment(folder: Path, *packages: str | Path) -> Path:
    """Make an environment without pip that holds the packages of some locks, and these; return its Python."""
    venv.create(folder, symlinks=not WINDOWS)
    python = folder / ("Scripts/python.exe" if WINDOWS else "bin/python")
    for words in packages:
        only = ("--require-hashes", "--only-binary", ":all:", "--requirement") if str(words).endswith(".lock") else ()
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *only, words)
    return python


def add_licences(packages: str, library: str, folder: Path) -> None:
    """Copy the licences of the packages, and of Python itself."""
    for package in metadata.distributions(path=[packages]):
        for file in package.files or ():
            if file.name.upper().startswith(("LICEN", "COPYING", "NOTICE")):
                place = folder / package.name / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), place)
    python = [path for path in (Path(library, "LICENSE.txt"), Path(sys.base_prefix, "LICENSE.txt")) if path.exists()]
    shutil.copy(python[0], folder / "Python-LICENSE.txt")


def add_python(sbom: Path) -> None:
    """Add to an SBOM what the program holds besides packages: Python itself, and its OpenSSL."""
    bill = json.loads(sbom.read_text(encoding="utf-8"))
    for name, version in (("CPython", platform.python_version()), ("OpenSSL", ssl.OPENSSL_VERSION.split()[1])):
        bill["components"].append({"type": "library", "bom-ref": name, "name": name, "version": version})
    sbom.write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")


def main(wheel: Path, out: Path) -> None:
    """Build."""
    version, system = wheel.name.split("-")[1], {"win32": "windows", "darwin": "macos"}.get(sys.platform, sys.platform)
    name = f"metquay-proxy-{version}-{system}-{platform.machine().lower()}"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        product = environment(Path(scratch, "product"), ROOT / "requirements.lock", wheel)
        tools = environment(Path(scratch, "tools"), ROOT / "requirements-program.lock")
        print(run(tools, ROOT / ".ci/sbom.py", product, out / f"{name}.cdx.json"), end="")
        add_python(out / f"{name}.cdx.json")
        packages, library = run(product, "-c", PLACES).split("\n")[:2]
        spec = ROOT / "deploy/program/metquay-proxy.spec"
        words = ("--noconfirm", "--log-level", "WARN", "--workpath", Path(scratch, "work"), "--distpath", scratch)
        run(tools, "-m", "PyInstaller", *words, spec, PYTHONPATH=packages)
        program = Path(scratch, "metquay-proxy")
        add_licences(packages, library, program / "licences")
        for script in (ROOT / "deploy/windows").glob("*.ps1") if WINDOWS else ():
            shutil.copy(script, program)
        archive = shutil.make_archive(str(out / name), "zip" if WINDOWS else "gztar", scratch, program.name)
        size = sum(file.stat().st_size for file in program.rglob("*") if file.is_file())
    print(f"{Path(archive).name}: {Path(archive).stat().st_size / 1e6:.0f} MB, unpacked {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
