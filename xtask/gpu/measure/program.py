"""Runs one step and judges its output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from steps import Step

# How a step can end: as it should, not as it should, by its own limit, by the budget, not begun.
OUTCOMES = ("ok", "failed", "timed_out", "cut_off", "not_run")
# Characters kept in the report of what a step printed; the whole is in its files.
KEPT = 20_000


class Stopped(Exception):
    """This program was told to end."""


def run(
    step: Step, command: tuple[str, ...], seconds: float, cut: str, outputs: Path, folder: Path, environment
) -> dict:
    """Runs `command` for at most `seconds`, which ends it with the outcome `cut`; the step's entry in the report.

    Standard output and error go to files in `outputs`. A program that the step's own program started ends with it.
    """
    out, err = outputs / f"{step.name}.out", outputs / f"{step.name}.err"
    entry = {"name": step.name, "command": list(command), "outcome": "failed", "reason": None}
    entry |= {"exit_code": None, "seconds": 0.0, "stdout_file": str(out), "stderr_file": str(err)}
    start = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return entry | {"reason": f"{command[0]} can't be started: {error.strerror}"}
        try:
            entry["exit_code"] = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            entry |= {"outcome": cut, "reason": f"not done after {seconds:.0f} s"}
        finally:
            end(child)
    entry["seconds"] = round(time.monotonic() - start, 3)
    printed = out.read_text(errors="replace")
    entry["stderr"] = err.read_text(errors="replace")[-KEPT:]
    if step.prints == "tests":
        entry["tests"] = tests(printed)
    if entry["exit_code"] == 0:
        entry |= judged(step, printed, entry)
    elif entry["exit_code"] is not None:
        failed = entry.get("tests", {}).get("failed")
        words = f"{', '.join(failed)} failed" if failed else the_error(entry["stderr"] or printed)
        entry["reason"] = f"exit status {entry['exit_code']}: {words}"
    if "result" not in entry:
        entry["stdout"] = printed[-KEPT:]
    return entry


def end(child: subprocess.Popen) -> None:
    """Ends what is left of the step's processes; CUDA may need a moment to give its memory back."""
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        try:
            os.killpg(child.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            child.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def judged(step: Step, printed: str, entry: dict) -> dict:
    """Whether a program that says it succeeded has printed what it should."""
    if step.prints == "text":
        return {"outcome": "ok"}
    if step.prints == "tests":
        found = entry["tests"]
        if not found["passed"] or found["failed"]:
            return {"reason": f"{found['passed']} tests passed, {len(found['failed'])} failed"}
        return {"outcome": "ok"}
    try:
        result = json.loads(printed)
    except ValueError as error:
        return {"reason": f"no JSON: {error}"}
    if step.prints in ("layers", "devices") and not (isinstance(result, list) and result):
        return {"reason": f"no array of {step.prints}", "result": result}
    return {"outcome": "ok", "result": result}


def tests(printed: str) -> dict:
    """The tests that passed and failed, also of a run that was cut off, and what the device could not run."""
    return {
        "passed": len(re.findall(r"^test \S+.* \.\.\. ok$", printed, re.MULTILINE)),
        "failed": sorted(set(re.findall(r"^test (\S+).* \.\.\. FAILED$", printed, re.MULTILINE))),
        "not_run": sorted(set(re.findall(r"^NOT RUN .*$", printed, re.MULTILINE))),
    }


def the_error(text: str) -> str:
    """The line that says what was wrong: the first that begins so, else the last."""
    lines = [line.strip() for line in text.strip().splitlines()] or ["it printed nothing"]
    return next((line for line in lines if line.lower().startswith("error")), lines[-1])[:400]
