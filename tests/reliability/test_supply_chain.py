"""What is installed

`make install` takes every package in the version and with the hashes of requirements.lock, and refuses any other file.
No package that a user needs has an unknown licence or one of strong copyleft; docs/LICENSES.md lists them.
`make audit` asks PyPI for known vulnerabilities; where figures and tests were made, that question cannot be asked, and
it has not been answered yet.
"""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
import setuptools  # noqa: F401  brings distutils
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.licenses import PAGE, dependencies, license_of

ROOT = Path(__file__).parents[2]
LOCKED = re.compile(
    r"^(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>\S+)(?: ; (?P<marker>.*?))? \\\n(?P<hashes>(?: +--hash=.*\n)*)", re.M
)
HASH = re.compile(r"^ +--hash=sha256:[0-9a-f]{64}(?: \\)?$")
STRONG_COPYLEFT = re.compile(r"\bA?GPL|(?<!Lesser )General Public License|Affero|European Union Public|Sleepycat|SSPL")


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


@pytest.fixture(scope="module")
def locked(lock) -> dict[str, list[str]]:
    """Versions of each package: there are two where Pythons differ."""
    found: dict[str, list[str]] = {}
    for match in LOCKED.finditer(lock):
        found.setdefault(match["name"], []).append(match["version"])
    return found


def setup_requirements() -> list[Requirement]:
    """Those of setup.py as it stands, all extras included."""
    from distutils.core import run_setup

    made = run_setup(str(ROOT / "setup.py"), stop_after="init")
    return [Requirement(line) for line in [*made.install_requires, *sum(made.extras_require.values(), [])]]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(each.name): each.specifier for each in found}


def test_every_package_has_hashes(lock, locked, evidence):
    matches = list(LOCKED.finditer(lock))
    assert len(matches) == sum("==" in line and not line.startswith((" ", "#")) for line in lock.splitlines())
    for match in matches:
        lines = match["hashes"].splitlines()
        assert lines and all(map(HASH.match, lines)), match["name"]
    evidence("packages pinned", len(locked))
    evidence("files of them, by hash", sum(len(match["hashes"].splitlines()) for match in matches))


def test_lock_comes_from_nowhere_else(lock):
    assert not re.search(r"https?://|file:|^-|^/|@ ", lock, re.M), "an address, an option or a path"


def test_lock_satisfies_setup_and_constraints(locked):
    for requirement in setup_requirements():
        versions = locked[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement}: make lock"
    for name, specifier in pins().items():
        assert all(specifier.contains(version) for version in locked[name]), f"{name}{specifier}: make lock"


def test_what_setup_names_is_pinned_by_hand():
    names = {canonicalize_name(requirement.name) for requirement in setup_requirements()}
    assert names <= pins().keys(), "constraints.txt: the versions that figures and tests were made with"


def test_licenses(evidence):
    packages = dependencies()
    assert len(packages) > 50, "torch alone brings more"
    for name in packages:
        assert license_of(name), f"{name}: its metadata says no licence: read it, and add it to docs/licenses.py"
        assert not STRONG_COPYLEFT.search(license_of(name)), f"{name}: {license_of(name)}"
    evidence("licences of packages users need, none unknown or of strong copyleft", len(packages))


@pytest.mark.parametrize(
    ("license", "strong"),
    [
        ("GPL-3.0-or-later", True),
        ("AGPL-3.0-only", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("GNU Affero General Public License v3", True),
        ("LGPL-2.1-or-later", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("MPL-2.0 AND MIT", False),
    ],
)
def test_strong_copyleft_is_recognized(license, strong):
    assert bool(STRONG_COPYLEFT.search(license)) == strong


def test_page_of_licenses_is_the_lock_s(locked):
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| (\d\S*) \| (.+?) \| .* \|$", PAGE.read_text(), re.M)
    page = {name: (version, said) for name, version, said in rows}
    again = "python -m docs.licenses, in the environment of make install"
    for name, (version, _) in page.items():
        assert version in locked.get(name, ()), f"{name}: {again}"
    for name in dependencies():
        version = distribution(name).version
        if version in locked.get(name, ()):  # another release may have another licence
            assert page.get(name) == (version, license_of(name)), f"{name}: {again}"
