"""Make all that a release consists of, and stop before anything is uploaded: ``make release``.

It sets the version everywhere, dates the changelog, builds the Python and the npm package, and
writes checksums and an SBOM beside them. What is left to do is printed.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENT = Path("clients") / "js"
CHART = Path("deploy/helm/pokebridge/Chart.yaml")
VERSION = re.compile(r"\d+\.\d+\.\d+")
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(.*(?:\n .*)*)", re.MULTILINE)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


class ReleaseError(Exception):
    """The release is impossible; the message is one line."""


def set_version(root: Path, version: str, today: str) -> None:
    """Write ``version`` wherever it stands, and give the changelog's newest entries to it."""
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text()
    if f"## [{version}]" in text:
        raise ReleaseError(f"CHANGELOG.md has a section for {version} already")
    _, found, unreleased = text.partition("## [Unreleased]\n")
    if not found or not unreleased.split("\n## [", 1)[0].strip():
        raise ReleaseError("CHANGELOG.md has nothing under [Unreleased]: say what is new first")
    heading = f"## [Unreleased]\n\n## [{version}] - {today}\n"
    changelog.write_text(text.replace("## [Unreleased]\n", heading, 1))
    project = root / "pyproject.toml"
    line = f'version = "{version}"'
    project.write_text(re.sub(r'^version = ".*"$', line, project.read_text(), flags=re.MULTILINE))
    for name in ("package.json", "package-lock.json"):
        path = root / CLIENT / name
        manifest = json.loads(path.read_text())
        manifest["version"] = version
        if "packages" in manifest:
            manifest["packages"][""]["version"] = version
        path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    chart = root / CHART
    keys = r"^(version|appVersion): .*$"
    chart.write_text(re.sub(keys, rf"\1: {version}", chart.read_text(), flags=re.MULTILINE))


def build(root: Path, into: Path) -> None:
    """Build the wheel, the source distribution and the npm package."""
    into.mkdir(parents=True)
    uv = Path(sys.executable).with_name("uv")
    tool = [str(uv), "build", "--quiet", "--no-build-isolation", "--python", sys.executable]
    _run([*tool, "--out-dir", str(into), "."], root)
    _run(["npm", "pack", "--silent", "--pack-destination", str(into)], root / CLIENT)
    (into / ".gitignore").unlink(missing_ok=True)  # of uv


def _run(command: list[str], directory: Path) -> bytes:
    """What ``command`` prints."""
    return subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, check=True).stdout  # noqa: S603 - ours


def sbom(lock: str, version: str) -> dict[str, Any]:
    """A CycloneDX bill of what the lock of the wheel's dependencies names."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "name": "pokebridge",
                "version": version,
                "purl": f"pkg:pypi/pokebridge@{version}",
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": list(_components(lock)),
    }


def _components(lock: str) -> Iterator[dict[str, Any]]:
    for name, version, rest in _LOCKED.findall(lock):
        yield {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower()}@{version}",
            "hashes": [{"alg": "SHA-256", "content": each} for each in _HASH.findall(rest)],
        }


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of all other files, as ``sha256sum --check`` reads it."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def _check_tree(root: Path) -> None:
    if _run(["git", "status", "--porcelain"], root):
        raise ReleaseError("the working tree has changes: commit them first")


def release(root: Path, version: str) -> Path:
    """Make the release ``version`` of the checkout ``root``. Returns the folder of its files."""
    if VERSION.fullmatch(version) is None:
        raise ReleaseError(f"VERSION must be like 1.2.3: {version}")
    folder = root / "dist" / version
    if folder.exists():
        raise ReleaseError(f"{folder} exists: delete it to build again")
    _check_tree(root)
    set_version(root, version, datetime.now(UTC).date().isoformat())
    build(root, folder)
    bill = sbom((root / "requirements-run.lock").read_text(), version)
    (folder / f"pokebridge-{version}.cdx.json").write_text(json.dumps(bill, indent=2) + "\n")
    write_sums(folder)
    return folder


def main() -> None:
    """Make a release and say what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    version = parser.parse_args().version
    try:
        folder = release(ROOT, version)
    except ReleaseError as error:
        sys.exit(f"release: {error}")
    sys.stdout.write(
        f"""Version {version} is in {folder.relative_to(ROOT)}. Nothing was uploaded. What is left:

  git commit -am 'Release {version}' && git tag v{version}
  uv publish {folder.relative_to(ROOT)}/*.whl {folder.relative_to(ROOT)}/*.tar.gz
  npm publish {folder.relative_to(ROOT)}/*.tgz
  docker build -t pokebridge:{version} .
  make site   # the documentation, in dist/site
  helm package deploy/helm/pokebridge

To begin again: git checkout . && rm -r {folder.relative_to(ROOT)}
"""
    )


if __name__ == "__main__":
    main()
