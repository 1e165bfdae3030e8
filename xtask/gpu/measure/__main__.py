"""Checks, tunes and measures flora on a GPU, one program after the other, and writes down everything in one JSON file.

A step that fails does not stop the next. The time budget does: what it leaves no time for is listed as not run. The
report is written anew after each step, so that whatever ends this program leaves the steps before.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import kernels
import machine
import program
import sizes
import steps
import toolkit

FOLDER = Path(__file__).resolve().parent.parent


def reserve(budget: float) -> float:
    """Seconds kept for ending the last step's processes and writing the report."""
    return min(8.0, budget / 10)


def least(budget: float) -> float:
    """A step with fewer seconds than this is not begun."""
    return min(10.0, budget / 10)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the time budget for everything; default 8")
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "results", help="the folder of the results; default results"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run these steps alone, such as conformance-rest or 'layers-*-bf16-*'; may be repeated",
    )
    parser.add_argument("--device", default="cuda", help="the device as flora names it; default cuda")
    parser.add_argument(
        "--rehearse",
        metavar="CARD",
        nargs="?",
        const="sm_90",
        help="without a GPU: small sizes on a card of this kind that the processor plays; default sm_90",
    )
    parser.add_argument(
        "--keep-kernels", action="store_true", help="of a rehearsal: keep the kernels' machine code for such a card"
    )
    parser.add_argument("--compile", action="store_true", help="compile every kernel, also those that were kept")
    parser.add_argument("--strict", action="store_true", help="fail when a step was not run, too")
    parser.add_argument("--list", action="store_true", help="list the steps and their commands, and run nothing")
    given = parser.parse_args()
    if not 0 < given.minutes <= 24 * 60:
        parser.error(f"--minutes is {given.minutes}; it must be above 0 and at most {24 * 60}")
    if given.keep_kernels and not given.rehearse:
        parser.error("--keep-kernels is of a rehearsal: --rehearse")
    if given.rehearse:
        given.device = f"cuda-emulated:{given.rehearse}"
    measured = sizes.REHEARSAL if given.rehearse else sizes.CARD
    all_steps = steps.steps(FOLDER, given.device, 60 * given.minutes, measured)
    for pattern in given.only:
        if not any(step.matches(pattern) for step in all_steps):
            parser.error(f"no step matches --only {pattern}; --list lists them")
    given.steps = steps.chosen(all_steps, given.only)
    return given


def before() -> float:
    """Seconds since the script was started, which may have had to unpack its folder first."""
    try:
        return max(0.0, time.time() - float(os.environ["FLORA_STARTED"]))
    except (KeyError, ValueError):
        return 0.0


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return {"error": str(error)}


def write(path: Path, report: dict) -> None:
    """Replaces the report at once: a reader never sees half of one."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, path)


def stop(number, _frame):
    raise program.Stopped(f"stopped by {signal.Signals(number).name}")


def absent_device(device: str, listing: dict) -> str | None:
    """Why the device under test can't be used, from the entry of the step that lists the devices."""
    if listing["outcome"] != "ok":
        return f"no devices could be listed: {listing['reason']}"
    found = [listed["id"] for listed in listing["result"]]
    if any(name == device or name.startswith(f"{device}:") for name in found):
        return None
    return f"flora lists no device {device}, only {', '.join(found) or 'none at all'}"


def absent_peer(device: str, torch: dict) -> str | None:
    """Why PyTorch can't be compared with."""
    if "error" in torch:
        return torch["error"]
    if steps.peer_device(device) == "cuda" and not torch["cuda_available"]:
        return f"PyTorch {torch['version']} sees no CUDA device"
    return None


def measure(given: argparse.Namespace, report: dict, path: Path, start: float, scratch: Path) -> None:
    """Fills the report, step by step."""
    budget = report["budget_seconds"]
    deadline = start + budget - reserve(budget)
    # To import PyTorch takes seconds, in which steps that don't need it can run.
    with ThreadPoolExecutor(1) as pool:
        torch = pool.submit(machine.torch)
        report["machine"] = machine.describe()
        sites = [Path(entry) for entry in sys.path if entry.endswith("-packages")]
        cuda = report["machine"]["cuda"] = toolkit.lay_out(scratch, sites, dict(os.environ))
        environment = dict(os.environ) | cuda["environment"]
        environment |= {
            "FLORA_TEST_DEVICE": given.device,
            # A card has its own, and a test on one doesn't look at it.
            "FLORA_EMULATED_DRIVER": str(FOLDER / "lib" / "libflora_emulated_driver.so"),
            "FLORA_GOLDEN": str(FOLDER / "golden"),
            "FLORA_CONFIG": str(path.parent / "tuning"),
        }
        how = kernels.how(given.device, given.keep_kernels, given.compile)
        report["kernels"], more = kernels.set_up(how, FOLDER, scratch, cuda["real_nvrtc"])
        run_steps(given, report, path, deadline, environment | more, torch)


def run_one(step: steps.Step, command: tuple[str, ...], seconds: float, cut: str, outputs: Path, environment) -> dict:
    """Runs a step, and counts its kernels; its entry in the report."""
    log = outputs / f"{step.name}.kernels"
    log.unlink(missing_ok=True)
    own = environment | {"FLORA_KERNELS_LOG": str(log)}
    entry = program.run(step, command, seconds, cut, outputs, FOLDER, own)
    return entry | {"kernels": kernels.counts(log)}


def run_steps(
    given: argparse.Namespace, report: dict, path: Path, deadline: float, environment: dict, torch: Future
) -> None:
    """Runs one step after the other, and writes the report after each."""
    budget = report["budget_seconds"]
    outputs = path.parent / "outputs"
    outputs.mkdir(exist_ok=True)
    absent: dict[str, str | None] = {"device": None}
    for number, step in enumerate(given.steps, 1):
        if "peer" not in absent and ("peer" in step.needs or "--peer" in step.command):
            report["machine"]["torch"] = torch.result()
            absent["peer"] = report["peer_not_run"] = absent_peer(given.device, report["machine"]["torch"])
        command = steps.without_peer(step.command) if absent.get("peer") else step.command
        left = deadline - time.monotonic()
        reason = next(filter(None, (absent[need] for need in step.needs)), step.left_out)
        if reason is None and left < least(budget):
            reason = "the time budget was spent"
        if reason is not None:
            entry = not_run(step, reason)
        else:
            print(f"[{number}/{len(given.steps)}] {step.name}, {left:.0f} s left", file=sys.stderr, flush=True)
            # A step's own limit says something about the step; the budget doesn't.
            cut = "timed_out" if step.limit <= left else "cut_off"
            entry = run_one(step, command, min(step.limit, left), cut, outputs, environment)
        if "--peer" in step.command:
            entry["peer_not_run"] = absent["peer"]
        if step.prints == "devices":
            absent["device"] = absent_device(given.device, entry)
            if absent["device"] and report["kernels"]["use"] == "found":
                # To start a device runs a kernel: a driver that takes no such machine code is told from no device by compiling.
                report["kernels"]["use"] = f"not used: with them {absent['device']}"
                environment = {name: value for name, value in environment.items() if name != "FLORA_KERNELS"}
                entry = run_one(step, command, min(step.limit, left), cut, outputs, environment)
                absent["device"] = absent_device(given.device, entry)
            if entry["outcome"] == "ok" and absent["device"]:
                entry |= {"outcome": "failed", "reason": absent["device"]}
        report["steps"].append(entry)
        write(path, report)
    report["machine"]["torch"] = torch.result()


def not_run(step: steps.Step, reason: str) -> dict:
    entry = {"name": step.name, "command": list(step.command), "outcome": "not_run", "reason": reason}
    return entry | {"exit_code": None, "seconds": 0.0}


def main() -> int:
    given = options()
    if given.list:
        for step in given.steps:
            print(f"{step.name:<36}{shlex.join(step.command)}")
        return 0
    start = time.monotonic() - before()
    path = given.out.resolve() / "report.json"
    report = {
        "schema": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "budget_seconds": 60 * given.minutes,
        "device": given.device,
        "rehearsal": sizes.REHEARSED if given.rehearse else None,
        "build": read_json(FOLDER / "build.json"),
        "machine": None,
        "steps": [],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, report)
    except OSError as error:
        print(f"error: can't write {path}: {error.strerror}; name another folder with --out", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    scratch = Path(tempfile.mkdtemp(prefix="flora-cuda-"))
    try:
        measure(given, report, path, start, scratch)
        stopped = None
    except program.Stopped as error:
        stopped = str(error)
        report["steps"] += [not_run(step, stopped) for step in given.steps[len(report["steps"]) :]]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report["gpus_afterwards"] = machine.gpus()
    if "kernels" in report:
        report["kernels"]["afterwards"] = kernels.number(FOLDER)
    report["seconds"] = round(time.monotonic() - start, 3)
    outcomes = [entry["outcome"] for entry in report["steps"]]
    report["outcomes"] = {outcome: outcomes.count(outcome) for outcome in program.OUTCOMES}
    write(path, report)
    summarise(report)
    print(f"\n{path}")
    failed = {"failed", "timed_out"} | ({"cut_off", "not_run"} if given.strict else set())
    return 1 if stopped or failed & set(outcomes) else 0


def summarise(report: dict) -> None:
    """Prints the outcomes; a step that was not run, or without its comparison, is as visible as one that failed."""
    if report["rehearsal"]:
        print(f"\n{report['rehearsal']}")
    print(f"\n{'step':<36}{'seconds':>8}  outcome")
    for entry in report["steps"]:
        found = entry.get("tests")
        words = [entry["outcome"].upper().replace("_", " ") if entry["outcome"] != "ok" else "ok"]
        if found:
            words.append(
                f"{found['passed']} passed, {len(found['failed'])} failed, {len(found['not_run'])} can't run here"
            )
        words += [entry["reason"]] if entry["reason"] else []
        if entry.get("kernels"):
            words.append(f"kernels {kernels.words(entry['kernels'])}")
        if entry["outcome"] == "ok" and entry.get("peer_not_run"):
            words.append(f"PyTorch NOT RUN: {entry['peer_not_run']}")
        print(f"{entry['name']:<36}{entry['seconds']:>8.1f}  {': '.join(words)}")


if __name__ == "__main__":
    sys.exit(main())
