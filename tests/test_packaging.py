"""Requirements, the inline metadata of diffuser.py, and the workflow say the same."""

import re

import pytest
from conftest import ROOT

import diffuser


def listed(name):
    """The requirements in a file, without comments and the files it includes."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r")]


def test_inline_metadata_lists_the_requirements():
    """PEP 723: `uv run diffuser.py` installs what requirements.txt lists, for the Pythons that are supported."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    text = (ROOT / "diffuser.py").read_text()
    block, = re.findall(r"(?m)^# /// script\n((?:^#(?:| .*)\n)+?)^# ///$", text)     # the expression in the PEP
    found = tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))
    assert found == {"requires-python": ">=3.10", "dependencies": listed("requirements.txt")}


def test_the_workflow_runs_what_ci_runs():
    """Python 3.10 to 3.13, through .ci/run."""
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    assert all(f'"3.{minor}"' in text for minor in (10, 11, 12, 13)) and "bash .ci/run" in text
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_every_registry_is_on_the_map():
    """CONTRIBUTING.md and the README name every place where something is added, and every script."""
    guide, readme = ((ROOT / name).read_text() for name in ("CONTRIBUTING.md", "README.md"))
    for registry in ("SCHEDULES", "PREDICTIONS", "TIME_DENSITIES", "SAMPLERS", "SPACINGS", "DATASETS", "PRESETS", "OPTIMIZERS", "LR_SCHEDULES"):
        assert hasattr(diffuser, registry) and f"`{registry}`" in guide
    for script in sorted(ROOT.glob("*.py")):
        assert f"`{script.name}`" in guide or f"`{script.name}`" in readme
