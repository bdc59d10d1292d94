"""Finds this machine's NVIDIA GPUs while the package is built: asks the driver's library, for torch is not there."""

from __future__ import annotations

import ctypes

LIBRARY = "libcuda.so.1"
# CUdevice_attribute, from cuda.h
MAJOR, MINOR = 75, 76


class NoGpu(Exception):
    """No GPU can be seen; the message says why."""


def capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the GPUs that this process may use, such as (9, 0), sorted, each once.

    Raises:
        NoGpu: there is no driver, it does not start, or it shows no GPU.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        raise NoGpu(f"there is no {LIBRARY}, which comes with NVIDIA's driver") from None

    def ask(function: str, *arguments: int) -> int:
        answer = ctypes.c_int()
        status = getattr(driver, function)(ctypes.byref(answer), *arguments)
        if status != 0:
            raise NoGpu(f"{LIBRARY}: {function} failed with error {status}")
        return answer.value

    status = driver.cuInit(0)
    if status != 0:
        raise NoGpu(f"{LIBRARY}: cuInit failed with error {status}")
    devices = [ask("cuDeviceGet", i) for i in range(ask("cuDeviceGetCount"))]
    if not devices:
        raise NoGpu("the driver shows none")
    return sorted(
        {tuple(ask("cuDeviceGetAttribute", number, device) for number in (MAJOR, MINOR)) for device in devices}
    )
