"""Notebooks run on the Python that runs fx, whatever kernel an editor has noted in them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from ipykernel.kernelspec import write_kernel_spec

NAME = "python3"
OPTIONS = {"kernel_name": NAME, "language": "python"}  # of papermill.execute_notebook


def noted(notebook: Path) -> nbformat.NotebookNode:
    """The notebook with this kernel noted in it, for papermill's inspection; ValueError for a file that is no notebook."""
    try:
        content = nbformat.read(notebook, 4)
    except Exception as error:  # JSON, nbformat and jsonschema have errors of their own
        raise ValueError(
            f"{notebook} is no notebook ({' '.join(str(error).split())[:200]}): restore the file"
        ) from error
    content.metadata["kernelspec"] = {"name": NAME, "language": "python", "display_name": "Python 3"}
    return content


@contextlib.contextmanager
def own() -> Iterator[None]:
    """Inside the block the kernel NAME is this Python, before any of that name that the user has installed."""
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder) / "kernels" / NAME)
        os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_PATH")
            os.environ |= {"JUPYTER_PATH": before} if before is not None else {}
