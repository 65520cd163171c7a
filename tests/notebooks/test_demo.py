"""The notebook runs from start to end with a tiny model and its verifier, and shows what it promises."""

import pytest

from model import GPT
from tests.conftest import ROOT
from tests.generation.test_verifier import folder as verifier_folder  # noqa: F401  (a fixture)


def test_the_notebook_runs(chat_folder, verifier_folder, monkeypatch):  # noqa: F811
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for key, value in {"MODEL": chat_folder, "VERIFIER": verifier_folder, "QUESTIONS": 2}.items():
        monkeypatch.setenv(key, str(value))
    notebook = nbformat.read(ROOT / "notebooks/demo.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # it is stored without outputs
    nbclient.NotebookClient(notebook, timeout=110, kernel_name="python3",
                            resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert f"{GPT.from_pretrained(chat_folder).num_parameters():,} parameters" in printed
    assert "{'role': 'assistant', 'content': " in printed and "layer  1  mean distance" in printed
    shown = [output["data"] for output in outputs if "data" in output]
    assert sum("image/png" in each for each in shown) == 2
    [votes] = [each["text/markdown"] for each in shown if "text/markdown" in each]
    assert [line.split(" | ")[1] for line in votes.splitlines()[2:]] == [
        "greedy", "pass@1", "pass@2", "maj@2", "weighted@2", "verified@2", "pass@4", "maj@4", "weighted@4",
        "verified@4", "oracle@4", "longer", "revise"]
