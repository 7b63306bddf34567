"""A finished run as an archive that others can read: python -m fx.crate FILE.zip [--profile mini].

An RO-Crate (Soiland-Reyes et al., 2022) of what a profile's notebooks have saved: its tables and figures, the notebooks
that this profile has executed (of mini those of the repository, too), the manifests of all steps behind them, and the pinned
environment. Its ro-crate-metadata.json has, for each notebook, a CreateAction: this software as instrument, the manifests as
what it used, tables and figures as what it made (Process Run Crate). Images and checkpoints stay in the work area: the
manifests hold their SHA-256.
"""

import argparse
import hashlib
import os
from pathlib import Path

from fx import command, provenance, results, runs
from fx.paths import COMPLETE, FIGURES, NOTEBOOKS, ROOT, TABLES

ABOUT = "https://w3id.org/ro/wfrun/process/0.5"
MISSING = "an archive needs the package rocrate: pip install 'fx[archive]'"


def write(file: Path, profile: str = COMPLETE) -> dict[str, int]:
    """Write the archive of a profile; how many tables, figures, notebooks and manifests it holds, and manifests it lacks.

    FileExistsError if `file` exists, FileNotFoundError where the profile has no tables, ValueError without rocrate.
    """
    try:
        from rocrate.model import ContextEntity
        from rocrate.rocrate import ROCrate
    except ImportError:
        raise ValueError(MISSING) from None
    if file.exists():
        raise FileExistsError(f"{file} exists: name another file")
    if not (tables := sorted((TABLES / profile).glob("*.csv"))):
        raise FileNotFoundError(f"{TABLES / profile} has no tables: run python -m fx.reproduce --profile {profile}")
    crate = ROCrate()
    crate.name = f"FineXtract, profile {profile}"
    crate.description = "Tables, figures, executed notebooks and the manifests of all steps behind them."
    crate.license = "https://spdx.org/licenses/MIT"
    software = ContextEntity(
        crate,
        "#fx",
        {"@type": "SoftwareApplication", "name": "fx", "version": results._versions()["fx"]},
    )
    crate.add(software)
    crate.root_dataset["conformsTo"] = {"@id": ABOUT}
    crate.add(ContextEntity(crate, ABOUT, {"@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}))

    def add(source: Path, place: str, kind: str):
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        return crate.add_file(source, place, properties={"encodingFormat": kind, "sha256": digest})

    add(ROOT / "requirements.txt", "requirements.txt", "text/plain")
    for extra in sorted((TABLES / profile).glob("*.json")) + sorted((TABLES / profile).glob("*.md")):
        add(
            extra,
            f"data/results/{profile}/{extra.name}",
            "application/json" if extra.suffix == ".json" else "text/markdown",
        )
    executed = results.RUNS / "executed" / profile
    folders = (NOTEBOOKS, executed) if profile == COMPLETE else (executed,)
    notebooks = {path.name: path for folder in folders for path in sorted(folder.glob("[0-9]*.ipynb"))}
    notebooks = {name: add(path, f"notebooks/{name}", "application/x-ipynb+json") for name, path in notebooks.items()}
    figures = sorted(FIGURES.glob(f"*-{profile}.png"))
    made = {path: add(path, f"data/results/{profile}/{path.name}", "text/csv") for path in tables}
    made |= {path: add(path, f"figures/{path.name}", "image/png") for path in figures}
    manifests, missing = {}, set()
    for first, files in _by_notebook(made).items():
        used = []
        for step in dict.fromkeys(step for file in files for step in runs.why(file)[0]):
            if (source := results.RUNS / step / results.MANIFEST).is_file():
                manifests[step] = manifests.get(step) or add(source, f"manifests/{step}.json", "application/json")
                used.append(manifests[step])
            else:
                missing.add(step)
        action = ContextEntity(
            crate, f"#run-{first}", {"@type": "CreateAction", "name": f"the notebook that saves {first} first"}
        )
        action["instrument"] = software
        action["object"] = used
        action["result"] = [made[file] for file in files]
        crate.add(action)
    part = file.with_name(f".{file.stem}.part-{os.getpid()}.zip")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        crate.write_zip(part)
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    counts = {"tables": len(tables), "figures": len(figures), "notebooks": len(notebooks)}
    return counts | {"manifests": len(manifests), "missing": len(missing)}


def _by_notebook(files) -> dict[str, list[Path]]:
    """Saved files by the first one of the notebook that saved them; those of which nothing was noted are left out."""
    found: dict[str, list[Path]] = {}
    for file in files:
        try:
            found.setdefault(provenance.of(file).first, []).append(file)
        except ValueError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fx.crate", description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.zip")
    parser.add_argument("--profile", default=COMPLETE, help="of which run (default: %(default)s)")
    given = parser.parse_args(arguments)
    counts = write(given.file, given.profile)
    print(f"{given.file}: " + ", ".join(f"{n} {what}" for what, n in counts.items() if what != "missing"))
    if counts["missing"]:
        print(
            f"{counts['missing']} steps are not in the work area {results.RUNS}: their manifests are not in the archive"
        )
    return 0


if __name__ == "__main__":
    command.run("fx.crate", main)
