"""Write the SBOM of an environment that holds the product: `sbom.py PYTHON FILE`, CycloneDX as JSON.

It lists each package that is installed there besides the product, and nothing else. Needs cyclonedx-bom.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = """
from importlib import metadata
import json
print(json.dumps({package.name: package.version for package in metadata.distributions()}))
"""


def output(*words: str) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(python: str, file: Path) -> None:
    """Write it, once it was compared with what is installed."""
    installed = {name.lower().replace("_", "-"): of for name, of in json.loads(output(python, "-c", PACKAGES)).items()}
    version = installed.pop("metquay-proxy")
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "pyproject.toml")  # cyclonedx-py takes no dynamic version
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        project.write_text(re.sub("(?m)^dynamic = .*", f'version = "{version}"', text), encoding="utf-8")
        words = ("--pyproject", str(project), "--mc-type", "application", "--output-reproducible")
        bill = json.loads(output(sys.executable, "-m", "cyclonedx_py", "environment", *words, python))
    named = {part["name"].lower().replace("_", "-"): part["version"] for part in bill["components"]}
    named.pop("metquay-proxy", None)
    subject = bill["metadata"]["component"]
    if named != installed or (subject["name"], subject["version"]) != ("metquay-proxy", version):
        sys.exit(f"the SBOM is of {subject} with {named}, and what is installed is {installed}")
    text = json.dumps(bill, indent=2) + "\n"
    if "file://" in text:
        sys.exit("the SBOM names a file of this machine")
    file.write_text(text, encoding="utf-8")
    print(f"{file.name} lists {len(named)} packages")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
