"""What a process has cost so far, as Linux counts it."""

import errno
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Nanoseconds on a CPU, and ready to run but waiting for one."""

    spent: int = 0
    waited: int = 0

    def __add__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.spent + other.spent, self.waited + other.waited)

    def __sub__(self, other: "CpuTime") -> "CpuTime":
        return CpuTime(self.spent - other.spent, self.waited - other.waited)


def cpu_time(pid: int) -> CpuTime:
    """Return what all threads of a process have had that still live. Raises OSError.

    From schedstat, which counts what the kernel does for the process within its system calls too.
    """
    return sum(map(_schedstat, Path(f"/proc/{pid}/task").iterdir()), CpuTime())


def own_cpu_time() -> CpuTime:
    """Return what this thread has had."""
    return _schedstat(Path("/proc/thread-self"))


def _schedstat(task: Path) -> CpuTime:
    spent, waited, _ = (task / "schedstat").read_text().split()
    return CpuTime(int(spent), int(waited))


def resident_memory(pid: int) -> int:
    """Return bytes of resident memory (VmRSS). Raises OSError, also if it has just ended."""
    _, found, rest = Path(f"/proc/{pid}/status").read_text().partition("\nVmRSS:")
    if not found:
        raise ProcessLookupError(errno.ESRCH, "No such process", pid)
    return int(rest.split()[0]) * 1024
