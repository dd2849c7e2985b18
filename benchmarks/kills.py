"""Disturb training, evaluation and comparison at random moments, rerun them, and compare with undisturbed runs.

python benchmarks/kills.py                 # all cases, four at a time
python benchmarks/kills.py "full disk"     # only the cases with these words in their name; other rows stay

Each case starts the same command, waits for a moment that shows in its files, waits a random time longer, and strikes:
SIGKILL, SIGTERM, SIGINT, a full disk (a small tmpfs that a second file fills), a folder that becomes read-only (a bind
mount, because root ignores permissions), or a second run into the same folder. Then the disturbance ends and the same
command runs again. Mounting needs root on Linux; without it, these cases are left out and the page says so.

A case fails if a file that counts as complete differs from the undisturbed run's, if the rerun ends differently from it
by one bit, if an error is a traceback, or if a message does not say what to do.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, save

SEED = 0
WORKERS = 4
ATTEMPTS = 8
"""Tries to hit a moment that lasts milliseconds."""
DISK = 64
"""Size in MB of the tmpfs for a full disk. A run of the recipe needs 30 MB."""
ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "pe_patch/assets/demo")
TIMES = {"seconds", "tokens_per_second", "memory", "peak_memory"}
"""Values of logs and rows that differ between any two runs."""
COMMANDS = {
    "train": [
        "train", str(ROOT / "recipes/configs/tiny_yarn.yaml"), "phases.0.length=512", "phases.0.batch=4",
        "phases.0.steps=12", "phases.0.warmup=2", "checkpoints.every=3", "evaluation.every=6",
        "evaluation.tasks=[perplexity,passkey]", "evaluation.lengths=[512]", "evaluation.samples=5", "progress=false",
        "resume=auto", "trackers=[]", "output={output}",
    ],
    "evaluate": [
        "evaluate", DEMO, "--scheme", "yarn", "--factor", "8", "--task", "passkey", "needle", "--length", "512",
        "--samples", "10", "--output", "{output}",
    ],
    "compare": [
        "compare", DEMO, "--scheme", "yarn", "linear", "--factor", "4", "--task", "passkey", "needle", "--length",
        "512", "--samples", "10", "--workers", "1", "--output", "{output}",
    ],
}  # fmt: skip
CODES = {"SIGKILL": {-9}, "SIGTERM": {143}, "SIGINT": {130}, "full disk": {1}, "read-only": {1}, "second run": {1, 2}}
"""Exit codes of a disturbed command. Of a second run, that of the run which came later."""
REMEDY = re.compile(r"[Rr]erun|resume=auto|Evaluate it with|another (output|folder)|same command")
"""A message that says what to do."""
NOISE = re.compile(
    r"^(Loading weights|Writing model shards|Failed to load|\[20|Note: |\S*Warning: |Writing |.*tokens/s)|^\s*$"
)


FORKS = multiprocessing.get_context("forkserver")


# Moments: what the files of a run show


def steps(output: Path) -> int:
    return sum(line["event"] == "step" for line in lines(output / "log.jsonl"))


def checkpoints(output: Path) -> list[Path]:
    return sorted(path.parent for path in (output / "checkpoints").glob("step-*/progress.json"))


def handles_sigterm(pid: int) -> bool:
    """Return whether the command has installed its handler: before that, Python imports the libraries."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def units(output: Path) -> int:
    return sum(len(lines(file)) for file in output.rglob("journal.jsonl"))


Beginning = Callable[[Path, int, random.Random], Callable[[], bool]]
"""Takes the output folder, the process id and a source of chance; returns a function that says if it has begun."""


@dataclass(frozen=True)
class Moment:
    """A moment of a run: when it begins, how long it may last in seconds, and how its files show it."""

    begins: Beginning
    lasts: float
    shows: Callable[[Path], bool] = lambda output: True
    """Return whether the files show that the run was killed at this moment."""


def after(count: Callable[[Path], int], first: int, last: int) -> Beginning:
    """Return a beginning: `count` has reached a random number from `first` to `last`."""

    def begins(output: Path, pid: int, chance: random.Random) -> Callable[[], bool]:
        number = chance.randint(first, last)
        return lambda: count(output) >= number

    return begins


def writing(output: Path, pid: int, chance: random.Random) -> Callable[[], bool]:
    number = chance.randint(0, 3)
    return lambda: len(checkpoints(output)) == number and (output / "checkpoints/.unfinished").exists()


MOMENTS = {
    "while it loads": Moment(lambda output, pid, chance: lambda: handles_sigterm(pid), 4.0),
    "before the first checkpoint": Moment(after(steps, 1, 2), 0.1, lambda output: not checkpoints(output)),
    "between checkpoints": Moment(after(lambda output: len(checkpoints(output)), 1, 3), 0.5),
    "while a checkpoint is written": Moment(
        writing, 0.03, lambda output: (output / "checkpoints/.unfinished").exists()
    ),
    "in the evaluation on the way": Moment(
        after(steps, 6, 6), 0.6, lambda output: steps(output) == 6 and len(checkpoints(output)) == 1
    ),
    "while the model is saved": Moment(
        lambda output, pid, chance: lambda: any(output.glob(".model-*")),
        0.03,
        lambda output: any(output.glob(".model-*")),
    ),
    "in the last evaluation": Moment(
        lambda output, pid, chance: lambda: any(line["event"] == "reloaded" for line in lines(output / "log.jsonl")),
        0.6,
    ),
    "after a few rows": Moment(after(units, 1, 6), 0.4),
}


def state(output: Path) -> str:
    """Describe the files of a run."""
    if (number := units(output)) or any(output.rglob("journal.jsonl")):
        return f"{number} units of work done"
    if not (output / "log.jsonl").exists():
        return "nothing written"
    parts = [f"step {steps(output)}", f"{len(checkpoints(output))} checkpoints"]
    parts += ["one being written"] * (output / "checkpoints/.unfinished").exists()
    parts += ["model being saved"] * any(output.glob(".model-*"))
    parts += ["model saved"] * (output / "model/config.json").exists()
    return ", ".join(parts)


# Disturbances


@dataclass(frozen=True)
class Case:
    """A command, what disturbs it, and when."""

    command: str
    strike: str
    moment: str

    @property
    def name(self) -> str:
        return f"{self.command}: {self.strike} {self.moment}"


@dataclass
class Outcome:
    """The result of a case."""

    number: int
    """Index of the case in `CASES`."""
    struck: str = ""
    exit_code: int | None = None
    message: str = ""
    rerun: int | None = None
    faults: list[str] = field(default_factory=list)


PHASES = {
    "SIGKILL": ("while it loads", "before the first checkpoint", "between checkpoints", "while a checkpoint is written",
                "while a checkpoint is written", "in the evaluation on the way", "while the model is saved",
                "in the last evaluation"),
    "SIGTERM": ("while it loads", "between checkpoints", "while a checkpoint is written", "while the model is saved",
                "in the last evaluation"),
    "SIGINT": ("before the first checkpoint", "in the last evaluation"),
    "full disk": ("between checkpoints", "while a checkpoint is written", "in the last evaluation"),
    "read-only": ("between checkpoints", "in the last evaluation"),
    "second run": ("between checkpoints",),
}  # fmt: skip
CASES = [
    *(Case("compare", strike, "after a few rows") for strike in ("SIGKILL", "SIGTERM", "second run")),
    *(Case("train", strike, moment) for strike, moments in PHASES.items() for moment in moments),
    *(Case("evaluate", strike, "after a few rows") for strike in CODES),
]


def enter(words: list[str], said: Path) -> None:
    """Run a command in this new process, with its output in a file."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts with `&`
    sys.argv = ["pe-patch", *words]
    from pe_patch.cli.main import main

    sys.exit(main(words))


class Command:
    """A running command, forked from a process that has imported the libraries, which saves half of the time."""

    def __init__(self, command: str, output: Path, *more: str) -> None:
        handle, name = tempfile.mkstemp(dir=output.parent.parent, suffix=".txt")
        os.close(handle)
        self.said = Path(name)
        words = [*(word.format(output=output) for word in COMMANDS[command]), *more]
        self.process = FORKS.Process(target=enter, args=(words, self.said), daemon=False)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def finish(self) -> tuple[int, str]:
        """Wait for the command, and return its exit code and its output."""
        self.process.join(600)
        assert self.process.exitcode is not None, "the command does not end"
        return self.process.exitcode, self.said.read_text(encoding="utf-8", errors="replace")


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@contextmanager
def place(case: Case, folder: Path) -> Iterator[Path]:
    """Yield the output folder of a case. If the case fills the disk, mount a small file system for it."""
    folder.mkdir()
    if case.strike == "full disk":
        mount("-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder))
    try:
        yield folder / "run"
    finally:
        if case.strike == "full disk":
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder)


def disturb(case: Case, process: Command, output: Path, chance: random.Random) -> tuple[int, str, str]:
    """Disturb a running command.

    Returns:
        Its exit code, what it wrote to stderr, and what else went wrong.
    """
    if case.strike.startswith("SIG"):
        os.kill(process.pid, signal.Signals[case.strike])
        return *process.finish(), ""
    if case.strike == "second run":
        os.kill(process.pid, signal.SIGSTOP)  # so that it does not end before the second run comes
        code, said = Command(case.command, output).finish()
        os.kill(process.pid, signal.SIGCONT)
        first, errors = process.finish()
        return code, said, "" if first == 0 else f"the first run ended with {first}: {last_line(errors)}"
    if case.strike == "full disk":
        ballast = output.parent / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        if chance.random() < 0.5:  # some writes still fit
            os.truncate(ballast, max(0, ballast.stat().st_size - 100_000))
        code, said = process.finish()
        ballast.unlink()
        return code, said, ""
    mount("--bind", str(output), str(output))
    try:
        while not read_only(output) and process.process.is_alive():
            time.sleep(0.01)  # the mount is busy while a file is open for writing
        code, said = process.finish()
    finally:
        subprocess.run(["umount", "-l", str(output)], check=True)
    return code, said, ""


def read_only(folder: Path) -> bool:
    """Make a bind mount read-only, and return whether it became so."""
    return subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], capture_output=True).returncode == 0


def attempt(case: Case, output: Path, chance: random.Random) -> Outcome | None:
    """Run a case once. Return None if the command ended before the strike, or the strike missed the moment."""
    moment, outcome = MOMENTS[case.moment], Outcome(CASES.index(case))
    process = Command(case.command, output)
    begins, limit = moment.begins(output, process.pid, chance), time.monotonic() + 120
    while process.process.is_alive() and not begins() and time.monotonic() < limit:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, moment.lasts))
    outcome.struck = state(output)
    if not process.process.is_alive():
        process.finish()
        return None
    outcome.exit_code, said, other = disturb(case, process, output, chance)
    if outcome.exit_code == 0 and case.strike != "second run":
        return None  # it was done
    if case.strike == "SIGKILL":
        if not moment.shows(output):
            return None
        outcome.struck = state(output)
    outcome.message = last_line(said).replace(str(output), "RUN")
    outcome.faults += [other] if other else []
    outcome.faults += ["a traceback"] if "Traceback" in said else []
    if outcome.exit_code not in CODES[case.strike]:
        outcome.faults.append(f"exit code {outcome.exit_code}")
    if case.strike != "SIGKILL" and not REMEDY.search(outcome.message):
        outcome.faults.append("the message does not say what to do")
    return outcome


def last_line(said: str) -> str:
    kept = [line for line in re.split(r"[\n\r]", said) if not NOISE.search(line)]
    return kept[-1].strip() if kept else ""


def carry_out(case: Case, number: int, folder: Path, reference: Path) -> Outcome:
    """Run a case until its strike hits, rerun the command, and compare with the undisturbed run."""
    outcome = None
    for trial in range(ATTEMPTS):
        chance = random.Random(f"{SEED}/{number}/{trial}")
        with place(case, folder / f"{number}-{trial}") as output:
            outcome = attempt(case, output, chance)
            if outcome is None:
                continue
            outcome.number = number
            outcome.faults += [f"{name} counts as complete, but differs" for name in half_written(output, reference)]
            outcome.rerun, said = Command(case.command, output).finish()
            if outcome.rerun:
                outcome.faults.append(f"the rerun ended with {outcome.rerun}: {last_line(said)}")
            outcome.faults += differences(output, reference)
            break
    outcome = outcome or Outcome(number, faults=["the strike never hit the moment"])
    print(
        f"{case.name}: {outcome.struck}; {outcome.exit_code} {outcome.message!r}; {outcome.faults or 'equal'}",
        flush=True,
    )
    return outcome


# Comparison


def lines(path: Path) -> list[dict[str, Any]]:
    """Parse the complete lines of a file that may still be written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(path)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def half_written(output: Path, reference: Path) -> list[str]:
    """Return the files of a disturbed run that count as complete and differ from the undisturbed run's."""
    weights = [path / "weights.safetensors" for path in checkpoints(output)]
    weights += [output / "model/model.safetensors"] if (output / "model/config.json").exists() else []
    different = [path for path in weights if digest(path) != digest(reference / path.relative_to(output))]
    rows = [
        path for path in output.rglob("results.jsonl") if untimed(path) != untimed(reference / path.relative_to(output))
    ]
    return [str(path.relative_to(output)) for path in different + rows]


def differences(output: Path, reference: Path) -> list[str]:
    """Return what differs between a run that was disturbed and rerun, and the undisturbed run."""
    names = {path.relative_to(root) for root in (output, reference) for path in root.rglob("*") if path.is_file()}
    kept = sorted(str(name) for name in names if name.parts[0] != "runs")  # the tracker's files have the time as name
    found = []
    for name in kept:
        ours, theirs = output / name, reference / name
        if not theirs.exists():
            found.append(f"{name} is left over")
        elif not ours.exists():
            if not name.startswith("checkpoints/"):  # the undisturbed run keeps all of them
                found.append(f"{name} is missing")
        elif name.endswith(".safetensors"):
            if digest(ours) != digest(theirs):
                found.append(f"{name} differs")
        elif name.endswith(("log.jsonl", "results.jsonl", "answers.jsonl")):
            if untimed(ours) != untimed(theirs):
                found.append(f"{name} differs in {first_difference(untimed(ours), untimed(theirs))}")
    return found


def first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if one != other:
            keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            return f"line {number}: {', '.join(sorted(keys))}"
    return f"its number of lines, {len(ours)} instead of {len(theirs)}"


# The page


def markdown(rows: list[dict[str, Any]]) -> str:
    host, bad = machine(), sum(bool(row["faults"]) for row in rows)
    page = [
        "# Runs that were disturbed, and rerun",
        "",
        f"`tiny_yarn` with 12 steps of 4 x 512 tokens, a checkpoint every 3 and an evaluation at steps 6 and 12; "
        f"`evaluate` and `compare` on the demo model. Each was disturbed at a random moment (seed {SEED}), and the "
        "same command ran again. *Equal*: the weights have the SHA-256 of an undisturbed run's, log and rows are equal "
        "except for times and memory, no file is missing or left over, and no file of the disturbed run that counted "
        "as complete differed.",
        "",
        f"{len(rows) - bad} of {len(rows)} cases are equal and say what to do; {len(CASES) - len(rows)} were left out. "
        f"A full disk is a tmpfs of {DISK} MB that another file fills; a read-only folder is a bind mount.",
        "",
        f"`python benchmarks/kills.py` on {host['cpu']}, shared with other work, {WORKERS} runs at a time with one "
        f"thread each; torch {host['torch']}, transformers {host['transformers']}, Python {host['python']}.",
        "",
        "| command | disturbed by | when | its files then | exit code | message | after the rerun |",
        "| --- | --- | --- | --- | ---: | --- | --- |",
    ]
    for row in rows:
        case, message = CASES[row["number"]], row["message"].replace("|", "\\|")
        page.append(
            f"| {case.command} | {case.strike} | {case.moment} | {row['struck']} | {row['exit_code']} | "
            f"{message or '-'} | {'; '.join(row['faults']) or 'equal'} |"
        )
    return "\n".join(page) + "\n"


def main(wanted: str = "") -> int:
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    FORKS.set_forkserver_preload(
        ["pe_patch.cli.main", "pe_patch.training.run", "pe_patch.evaluation", "pe_patch.compare"]
    )
    can_mount = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None
    cases = {number: case for number, case in enumerate(CASES) if wanted in case.name}
    possible = {n: case for n, case in cases.items() if can_mount or case.strike not in ("full disk", "read-only")}
    with tempfile.TemporaryDirectory(prefix="kills-") as name, ThreadPoolExecutor(WORKERS) as pool:
        folder = Path(name).resolve()
        references = {
            command: folder / "reference" / command
            for command in dict.fromkeys(case.command for case in possible.values())
        }
        for command, output in references.items():
            # A checkpoint of every step, so that every one of a disturbed run can be compared.
            more = ["checkpoints.every=1", "checkpoints.keep=99"] if command == "train" else []
            code, said = Command(command, output, *more).finish()
            assert code == 0, said
        jobs = [
            pool.submit(carry_out, case, number, folder, references[case.command]) for number, case in possible.items()
        ]
        outcomes = []
        for job in as_completed(jobs):  # a case that crashes this script loses no other
            outcomes.append(job.result())
            store(outcomes, keep=bool(wanted))
    return int(any(outcome.faults for outcome in outcomes))


def store(outcomes: list[Outcome], *, keep: bool) -> None:
    """Write the table of these outcomes; `keep` leaves the rows of other cases."""
    file = RESULTS / "kills.json"
    kept = json.loads(file.read_text())["cases"] if keep and file.exists() else []
    rows = {row["number"]: row for row in [*kept, *map(asdict, outcomes)]}
    ordered = [rows[number] for number in sorted(rows)]
    save("kills", {"seed": SEED, "cases": ordered})
    (RESULTS / "kills.md").write_text(markdown(ordered), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
