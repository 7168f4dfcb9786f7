"""diffuser_lib/machine.py: packages, speed."""

import pytest
import torch

from diffuser_lib import machine


@pytest.mark.parametrize("seconds, words", [
    (0.0416, "41.6 ms"), (0.999, "1.0 s"), (4.52, "4.5 s"), (45.2, "45 s"), (99.6, "2 min"), (725, "12 min"), (3599, "1 h 0 min"),
    (12_000, "3 h 20 min"), (71.9 * 3600, "71 h 54 min"), (26 * 86_400, "26 days"), (1e9, "11,574 days")])
def test_durations_are_said_as_people_say_them(seconds, words):
    """One unit, or hours with minutes; never 60 minutes of an hour."""
    assert machine.duration(seconds) == words


def test_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    """What is there has a version, what is not is missing, whatever lies in sys.modules; a folder is no package."""
    assert machine.is_installed("torch") and machine.package_version("torch").startswith("2")
    (tmp_path / "a_mere_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not machine.is_installed("a_mere_folder")
    assert not machine.is_installed("no_such_module") and machine.package_version("no-such-package") == ""
    for module, package, purpose in machine.PACKAGES:
        assert module and package and purpose


def test_the_rate_is_that_of_real_products():
    """As many operations as n^3 multiplications and additions are, in the time they take."""
    rate = machine.matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 0.01 < rate < 1e5
