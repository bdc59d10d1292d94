"""Runs the stages of `stages.py` one after the other, and has told what it knows at every moment.

After every line that a stage prints, ``summary.txt`` is written anew: what is done, what runs, and the last lines of
each stage. ``results.tgz`` holds the logs and files of all stages, and is at most a second older. So a run that is cut
off at any moment, even killed, has left both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from benchmarks.gpu.stages import ALL, GROUPS, QUICK, ROOT, STAGES, Stage, expand

LEAST = 5  # seconds in which it is worth while to begin a stage
DESCRIPTION = """Checks and measures the kernels on a machine with an NVIDIA GPU, what is worth most first.

stages: {stages}
groups: {groups}
"""

# In a process of its own: this one holds no memory of the GPU while the stages run.
WHERE = """import sys, torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda, "torch", torch.__version__, sys.version.split()[0])
"""
NO_GPU = "torch sees no CUDA device; --rehearse tries the stages on the CPU, on small sizes"


class Run:
    """One run: its stages, and the files that tell about them.

    Args:
        stages: what to run.
        out: where summary.txt and results.tgz go.
        limit: seconds for all stages but `build`.
        about: the first line of the summary.
    """

    def __init__(self, stages: list[Stage], out: Path, limit: float, about: str) -> None:
        self.out, self.about = out, about
        self.limit, self.end = limit, 0.0
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.states: dict[str, str] = {stage.name: "not reached" for stage in stages}
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, deque[str]] = {stage.name: deque(maxlen=stage.shown) for stage in stages}
        self.stages = stages
        self._lock = threading.Lock()
        self._archived = 0.0
        out.mkdir(parents=True, exist_ok=True)

    def summary(self) -> str:
        """What is known so far."""
        rows = [f"{name:10s} {state:22s} {self.seconds.get(name, 0):5.0f} s" for name, state in self.states.items()]
        parts = [self.about, "", *rows]
        for name, lines in self.lines.items():
            parts += ["", f"---- {name} ----", *lines] if lines else []
        return "\n".join(parts) + "\n"

    def tell(self, archive: bool = False) -> None:
        """Writes the summary, and the archive if it is a second old or is asked for."""
        with self._lock:
            replace(self.out / "summary.txt", lambda path: path.write_text(self.summary()))
            if archive or time.monotonic() - self._archived > 1:
                replace(self.out / "results.tgz", self._archive)
                self._archived = time.monotonic()

    def _archive(self, path: Path) -> None:
        (self.folder / "summary.txt").write_text(self.summary())
        with tarfile.open(path, "w:gz", compresslevel=4) as archive:
            for file in sorted(self.folder.rglob("*")):
                with contextlib.suppress(FileNotFoundError):  # moved into place meanwhile, under its name
                    archive.add(file, file.relative_to(self.folder), recursive=False)

    def perform(self, places: dict[str, str], variables: dict[str, str]) -> bool:
        """Runs the stages; whether all went well. An interrupt ends the stage that runs, and all that follow."""
        places = places | {"out": str(self.folder)}
        for stage in self.stages:
            if stage.name != "build":  # which takes what it takes
                self.end = self.end or time.monotonic() + self.limit
            most = min(stage.seconds, self.end - time.monotonic()) if self.end else stage.seconds
            if most < LEAST:
                self.states[stage.name] = "no time was left"
                continue
            self.states[stage.name] = "runs"
            self.tell()
            began = time.monotonic()
            try:
                self.states[stage.name] = self._stage(stage, most, places, variables)
            except KeyboardInterrupt:
                self.states[stage.name] = "interrupted"
                raise
            finally:
                self.seconds[stage.name] = time.monotonic() - began
                self.tell(archive=True)
        self.tell(archive=True)
        return all(state == "ok" for state in self.states.values())

    def _stage(self, stage: Stage, most: float, places: dict[str, str], variables: dict[str, str]) -> str:
        command = [part.format(**places) for part in stage.command]
        if shutil.which(command[0]) is None:
            return f"FAILED: no {command[0]}"
        with open(self.folder / f"{stage.name}.log", "w") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables, **dict(stage.variables)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that it can be interrupted with all that it started
            )
            reader = threading.Thread(target=self._read, args=(stage, process, log), daemon=True)
            reader.start()
            try:
                code = process.wait(most)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
                end(process, stage.grace)
                reader.join(LEAST)
                if isinstance(stopped, KeyboardInterrupt):
                    raise
                return f"FAILED: over {most:.0f} s"
            reader.join(LEAST)
        return "ok" if code == 0 else f"FAILED: code {code}"

    def _read(self, stage: Stage, process: subprocess.Popen, log: object) -> None:
        for line in process.stdout:
            log.write(line)
            log.flush()
            self.lines[stage.name].append(line.rstrip())
            self.tell()


def end(process: subprocess.Popen, grace: float) -> None:
    """Interrupts a stage with all that it started, so that it can say what it has; then ends it by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def replace(path: Path, write: object) -> None:
    """Writes a file beside its place and moves it there: it is whole at every moment."""
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


def device(rehearse: bool) -> str:
    """What the run is on, in a line. Raises RuntimeError where it cannot be on anything."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError(f"{sys.executable} has no torch; PYTHON names another")
    found = subprocess.run([sys.executable, "-c", WHERE], capture_output=True, text=True, check=False).stdout.strip()
    if found:
        return found
    if not rehearse:
        raise RuntimeError(NO_GPU)
    return "a rehearsal on the CPU"


def environment(site: Path) -> dict[str, str]:
    """Variables of all stages."""
    path = [str(site), str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(ROOT / "build" / "triton")),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line. Exits with 2 and one line where it is wrong."""
    described = DESCRIPTION.format(
        stages=", ".join(STAGES), groups="; ".join(f"{name}: {', '.join(all_)}" for name, all_ in GROUPS.items())
    )
    parser = argparse.ArgumentParser(
        "gpu_check.sh", description=described, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: sys.exit(complain(message))
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages or groups; by default all")
    parser.add_argument("--out", type=Path, help="folder for summary.txt and results.tgz; $OUT, else gpu-check")
    parser.add_argument("--limit", type=float, help=f"seconds for all but build; {QUICK} for quick alone, else {ALL}")
    parser.add_argument("--prepared", type=Path, help="a folder that prepared.py made; what fits of it is used")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU too: small sizes, on the CPU")
    return parser.parse_args(arguments)


def complain(message: str) -> int:
    """Says what is wrong in one line; the code to exit with."""
    print(f"gpu_check: {message}", file=sys.stderr)
    return 2


def main() -> int:
    """0 if all stages went well, 1 if not, 2 if nothing could run, 130 if it was interrupted."""
    arguments = parse(sys.argv[1:])
    try:
        stages = expand(arguments.stages or ["all"])
    except ValueError as error:
        return complain(str(error))
    if arguments.prepared is not None and not arguments.prepared.is_dir():
        return complain(f"--prepared: no folder {arguments.prepared}")
    out = (arguments.out or Path(os.environ.get("OUT") or "gpu-check")).absolute()
    limit = arguments.limit or (QUICK if arguments.stages == ["quick"] else ALL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run = Run(stages, out, limit, "")
        run.about = device(arguments.rehearse)
    except OSError as error:
        return complain(f"{out}: {error.strerror or error}")
    except RuntimeError as error:
        run.about = str(error)
        run.tell(archive=True)
        return complain(str(error))
    site = ROOT / "build" / "site"
    places = {"prepared": str((arguments.prepared or ROOT / "build" / "prepared").absolute())}
    try:
        well = run.perform(places, environment(site))
    except KeyboardInterrupt:
        return 130
    finally:
        print(run.summary(), end="")
        shutil.rmtree(run.folder, ignore_errors=True)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
