"""Energy, where the machine tells it: RAPL counts the CPU packages, NVML each NVIDIA card. No torch here.

    /sys/class/powercap/intel-rapl:0/name                  package-0     (AMD's packages stand under intel-rapl too)
                                     energy_uj             microjoules since some moment; readable by root only on many systems
                                     max_energy_range_uj   where it starts again from zero
                       intel-rapl:0:0/…                    core, uncore, dram: parts of the package, or beside it

RAPL counts a whole package, whoever uses it: on a busy machine that is more than the training took. Only packages are added up:
their parts would count twice, as would `psys` and the second view of a package under intel-rapl-mmio. So memory that a server
counts apart from the package (dram) is left out.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
RAPL = "RAPL, the CPU packages of the whole machine"
_PACKAGE = re.compile(r"intel-rapl:\d+")


class Counter:
    """A counter of joules that only rises, and starts again from zero when it reaches `wraps_at`."""

    def __init__(self, read: Callable[[], float], wraps_at: float | None = None) -> None:
        self._read, self._wraps_at = read, wraps_at
        self._last = read()
        self.joules = 0.0
        """Since this object was made."""

    def update(self) -> float:
        """Read it; must be called at least once a turn (RAPL at 250 W: 4 to 17 minutes). A failed reading changes nothing."""
        with contextlib.suppress(Exception):  # measuring never fails what is measured
            now = self._read()
            risen = now - self._last
            if risen < 0.0 and self._wraps_at is not None:
                risen += self._wraps_at
            self.joules, self._last = self.joules + max(0.0, risen), now
        return self.joules


@dataclass(frozen=True)
class Source:
    """What tells energy here, or why nothing does."""

    name: str
    counters: Sequence[Counter]
    missing: str = ""
    """Why there are no counters, in words."""


def rapl(root: Path = POWERCAP) -> Source:
    """The CPU packages under `root`."""
    try:
        zones = sorted(zone for zone in root.iterdir() if _PACKAGE.fullmatch(zone.name))
    except OSError:
        zones = []
    packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
    if not packages:
        return Source(RAPL, (), f"this machine tells no energy of its CPU ({root} has no package)")
    try:
        return Source(RAPL, [_package(zone) for zone in packages])
    except (OSError, ValueError) as error:
        reason = error.strerror or "" if isinstance(error, OSError) else str(error)
        return Source(RAPL, (), f"the energy of the CPU cannot be read ({packages[0] / 'energy_uj'}: {reason.lower()})")


def nvml(uuids: Sequence[str]) -> Source:
    """The NVIDIA cards with these UUIDs (`GPU-…`), Volta or newer."""
    name = f"NVML, {len(uuids)} card(s)"
    try:
        import pynvml  # only where there is a card

        pynvml.nvmlInit()
        return Source(name, [_card(pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids])
    except Exception as error:  # NVML has an error per thing that a driver or card may lack
        return Source(name, (), f"the cards tell no energy ({str(error).strip() or type(error).__name__})")


def _package(zone: Path) -> Counter:
    def read() -> float:
        return int((zone / "energy_uj").read_text()) / 1e6

    return Counter(read, int((zone / "max_energy_range_uj").read_text()) / 1e6)


def _card(handle: object) -> Counter:
    import pynvml

    def read() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # millijoules since the driver was loaded

    return Counter(read)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


class Meter:
    """Joules since it was made, over all the sources that tell any."""

    def __init__(self, *sources: Source) -> None:
        self._sources: list[Source] = []
        for source in sources:
            self.add(source)

    def add(self, source: Source) -> None:
        """Count what this source tells from now on."""
        self._sources = [*self._sources, source]

    def joules(self) -> float | None:
        """None where no source tells any."""
        counters = [counter for source in self._sources for counter in source.counters]
        return sum(counter.update() for counter in counters) if counters else None

    @property
    def source(self) -> str:
        """What is measured, in words; empty where nothing is."""
        return " + ".join(source.name for source in self._sources if source.counters)

    @property
    def missing(self) -> str:
        """What is not measured and why, in words; empty where nothing is missing."""
        return "; ".join(source.missing for source in self._sources if source.missing)
