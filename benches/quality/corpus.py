"""Makes the corpus of `flora bench quality`: source files of programming languages, out of Debian's packages of pinned versions.

    python3 benches/quality/corpus.py CORPUS                     # all languages
    python3 benches/quality/corpus.py CORPUS --languages racket,d
    python3 benches/quality/corpus.py CORPUS --record            # writes corpus.json anew, where versions were changed

Needs `apt-get`, with package sources of Debian 12 and their lists (`apt-get update`), and `dpkg-deb`. Nothing is installed.

CORPUS/LANGUAGE gets the folders `train`, `validation` and `held_out`. A file is in one of them by the hash of its path, whatever
the machine. Files that are copies of one another but for blanks are one file, and so is one of whose longer lines more than half
are in files that were taken before. `corpus.json`, beside this script, has a digest of every split: what is made is compared with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Language: package, version, extensions.
PACKAGES = {
    "racket": ("racket-common", "8.7+dfsg1-1", (".rkt",)),
    "d": ("libphobos2-ldc-shared-dev", "1:1.30.0-1+b1", (".d", ".di")),
    "perl": ("perl-modules-5.36", "5.36.0-7+deb12u3", (".pm",)),
    "ruby": ("libruby3.1", "3.1.2-7+deb12u1", (".rb",)),
    "rust": ("rust-src", "1.63.0+dfsg1-2", (".rs",)),
}
# Files of a split are taken in this order.
HELD_OUT_FILES = 128
VALIDATION_FILES = 64
TRAIN_BYTES = 3_000_000
# Shorter ones say nothing, and longer ones would be most of the text.
LEAST_BYTES = 600
MOST_BYTES = 65_536
# Lines that are no common closing bracket or import.
LINE_LENGTH = 24

RECORD = Path(__file__).with_name("corpus.json")


def unpack(package: str, version: str, folder: Path) -> None:
    """Puts the files of a package into `folder`."""
    with tempfile.TemporaryDirectory() as downloads:
        # apt-get downloads as another user where it is root's.
        Path(downloads).chmod(0o777)
        done = subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=downloads, capture_output=True, text=True)
        archives = list(Path(downloads).glob("*.deb"))
        if done.returncode != 0 or len(archives) != 1:
            sys.exit(f"error: apt-get doesn't download {package}={version}: {done.stderr.strip()}")
        subprocess.run(["dpkg-deb", "-x", archives[0], folder], check=True)


def texts(folder: Path, extensions: tuple[str, ...]) -> list[tuple[str, str]]:
    """Paths and texts of the source files, in the order of the hashes of their paths."""
    found = []
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.suffix not in extensions:
            continue
        if not LEAST_BYTES <= path.stat().st_size <= MOST_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        found.append((path.relative_to(folder).as_posix(), text))
    return sorted(found, key=lambda one: hashlib.sha256(one[0].encode()).digest())


def without_copies(files: list[tuple[str, str]]) -> list[tuple[str, str]]:
    kept, contents, lines_seen = [], set(), set()
    for path, text in files:
        content = "".join(text.split())
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= LINE_LENGTH}
        if content in contents or not lines or 2 * len(lines & lines_seen) > len(lines):
            continue
        contents.add(content)
        lines_seen |= lines
        kept.append((path, text))
    return kept


def splits(files: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    held_out, rest = files[:HELD_OUT_FILES], files[HELD_OUT_FILES:]
    validation, rest = rest[:VALIDATION_FILES], rest[VALIDATION_FILES:]
    train, size = [], 0
    for path, text in rest:
        size += len(text.encode())
        if size > TRAIN_BYTES:
            break
        train.append((path, text))
    return {"train": train, "validation": validation, "held_out": held_out}


def write(folder: Path, files: list[tuple[str, str]]) -> dict:
    """Writes a split, whose files' names sort as they were taken; what it is, in numbers."""
    folder.mkdir(parents=True)
    digest = hashlib.sha256()
    for index, (path, text) in enumerate(files):
        content = text.encode()
        digest.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
        (folder / f"{index:05}-{Path(path).name}").write_bytes(content)
    return {"files": len(files), "bytes": sum(len(text.encode()) for _, text in files), "sha256": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--languages", default=",".join(PACKAGES))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for language in options.languages.split(","):
        if language not in PACKAGES:
            sys.exit(f"error: there is no language {language}; there are {', '.join(PACKAGES)}")
        target = options.corpus / language
        if target.exists():
            sys.exit(f"error: {target} is there already; remove it to make it anew")
        package, version, extensions = PACKAGES[language]
        options.corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory(dir=options.corpus) as made:
            unpack(package, version, Path(unpacked))
            files = without_copies(texts(Path(unpacked), extensions))
            found = {name: write(Path(made) / language / name, own) for name, own in splits(files).items()}
            found = {"package": package, "version": version, **found}
            if options.record:
                record[language] = found
            elif record.get(language) != found:
                sys.exit(f"error: {language} isn't what corpus.json says: {json.dumps(found)}")
            shutil.move(Path(made) / language, target)
        counts = ", ".join(f"{name} {found[name]['files']} files, {found[name]['bytes']} bytes" for name in ("train", "validation", "held_out"))
        print(f"{language}: {counts}")
    if options.record:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
