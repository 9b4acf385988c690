"""Energy is counted where the machine tells it, and its absence has a reason."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.training.energy import Counter, Meter, nvml, rapl

RANGE = 262_143_328_850


def zone(root: Path, folder: str, name: str, microjoules: int = 0) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return place


def test_packages_are_added_up_and_their_parts_left_out(tmp_path):
    packages = [zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 5_000_000) for number in (0, 1)]
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core"), zone(tmp_path, "intel-rapl:0:1", "dram"),
        zone(tmp_path, "intel-rapl:2", "psys"), zone(tmp_path, "intel-rapl-mmio:0", "package-0"),
    ]  # fmt: skip
    meter = Meter(rapl(tmp_path))
    for place in others:
        (place / "energy_uj").write_text("9000000")
    for place, joules in zip(packages, (7, 8), strict=True):
        (place / "energy_uj").write_text(f"{joules * 1_000_000}")
    assert meter.joules() == pytest.approx(2 + 3)
    assert meter.source == "RAPL, the CPU packages of the whole machine"
    assert meter.missing == ""


@given(st.integers(0, RANGE - 1), st.lists(st.integers(0, RANGE - 1), max_size=20))
def test_a_counter_that_starts_again_from_zero_loses_nothing(start, rises):
    true = [start]
    counter = Counter(lambda: true[0] % RANGE, RANGE)
    for rise in rises:
        true[0] += rise
        counter.update()
    assert counter.joules == sum(rises)


def test_a_package_that_starts_again_from_zero_is_read_on(tmp_path):
    place = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    meter = Meter(rapl(tmp_path))
    (place / "energy_uj").write_text("2000000")
    assert meter.joules() == pytest.approx(3)
    (place / "energy_uj").unlink()
    assert meter.joules() == pytest.approx(3), "what cannot be read for once changes nothing"


def test_no_package_and_one_that_only_root_may_read_have_a_reason(tmp_path):
    for source in (rapl(tmp_path / "nowhere"), rapl(tmp_path)):
        assert Meter(source).joules() is None
        assert "this machine tells no energy of its CPU" in Meter(source).missing
    file = zone(tmp_path, "intel-rapl:0", "package-0") / "energy_uj"
    file.unlink()
    file.mkdir()  # for root, too, this cannot be read
    assert f"the energy of the CPU cannot be read ({file}: is a directory)" in Meter(rapl(tmp_path)).missing


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a card here")
def test_cards_without_a_driver_have_a_reason():
    meter = Meter(nvml(["GPU-1"]))
    assert meter.joules() is None
    assert meter.missing == "the cards tell no energy (NVML Shared Library Not Found)"


DRIVER = """
#include <string.h>
static unsigned long long energy[2];
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (strncmp(uuid, "GPU-", 4)) return 6;
    *handle = &energy[uuid[4] - '0'];
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    *millijoules = *(unsigned long long *)handle += handle == energy ? 1500 : 1000;
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_energy_of_all_cards_in_use_is_added_up(tmp_path):
    """A driver of ten lines behind NVIDIA's own binding: two cards that use 1.5 and 1 joule between two readings."""
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "driver.c"], cwd=tmp_path, check=True)
    code = (
        "from gptcore.training.energy import Meter, nvml\n"
        "meter = Meter(nvml(['GPU-0', 'GPU-1']))\n"
        "print(meter.joules(), meter.joules(), meter.source, Meter(nvml(['MIG-0'])).missing, sep='|')\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == "2.5|5.0|NVML, 2 card(s)|the cards tell no energy (Not Found)"
