"""Samples of a device's clocks, temperature, power and reasons for throttling, one a second."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

FIELDS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
# Name of the last column in drivers from 535 on, and before.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of the reasons that slow work down: all but idle and the clocks that an application asked for.
SLOW = ~0x3


class Clocks:
    """Samples until `close`. Each is the seconds since the begin, and the columns of nvidia-smi."""

    def __init__(self, number: str):
        self.samples: list[list[str]] = []
        self._process: subprocess.Popen[str] | None = None
        program = shutil.which("nvidia-smi")
        if program is None:
            return
        base = [program, "-i", number, "--format=csv,noheader,nounits"]
        for reasons in REASONS:
            command = [*base, f"--query-gpu={FIELDS},{reasons}"]
            try:
                tried = subprocess.run(command, capture_output=True, timeout=15)
            except subprocess.TimeoutExpired:
                return
            if tried.returncode == 0:
                self._begin([*command, "-lms", "1000"])
                return

    def _begin(self, command: list[str]) -> None:
        self._begun = time.monotonic()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.samples.append([f"{time.monotonic() - self._begun:.0f}", *(part.strip() for part in line.split(","))])

    def summary(self) -> dict[str, object] | None:
        """Returns extremes of the clocks, and the seconds in which something slowed the device down."""
        found = [numbers for sample in list(self.samples) if (numbers := parse(sample)) is not None]
        if not found:
            return None
        sm, memory, temperature, power = ([each[i] for each in found] for i in range(4))
        return {
            "samples": len(found),
            "sm_mhz": [min(sm), max(sm)],
            "memory_mhz": [min(memory), max(memory)],
            "temperature_c": max(temperature),
            "power_w": max(power),
            "throttled_s": sum(int(each[4]) & SLOW != 0 for each in found),
            "reasons": sorted({hex(int(each[4])) for each in found}),
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def parse(sample: list[str]) -> list[float] | None:
    """Returns the columns after the time as numbers, or None if the device does not report one."""
    try:
        return [*map(float, sample[1:5]), int(sample[5], 16)]
    except (ValueError, IndexError):
        return None
