"""Ship a model: a Hugging Face folder, GGUF files for llama.cpp, or packed ternary weights; with a card.

    python export.py --model=out/dpo                                          # bfloat16, exports/dpo-hf
    python export.py --model=out/dpo --format=gguf --quantize=q8_0,q4_k_m --out=exports/mine
    python export.py --model=out/ternary --format=ternary                     # 2 bits a weight

Reads any model folder that the other scripts read; an adapter is merged into its base. What it writes they
read as well, GGUF where a folder holds one type: so eval.py measures what is shipped. Writes a folder that
is whole or absent: the files, README.md (the card: data, settings, scores, hashes) and manifest.json (sha256
of each file). The same export again finds it done; from other inputs it is refused unless --overwrite=True.

    hf        config.json, model.safetensors, tokenizer.json, ..       what transformers loads
    gguf      <name>-<type>.gguf, one for each type of --quantize      f32, f16, bf16, q8_0, q6_k, q4_k_m
    ternary   the hf layout, the ternary matrices as 2 bits a weight and a scale

What a format cannot hold is refused by name before anything is written. Left out: uploading, files in several
parts, importance matrices.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from configurator import UserError, configure, run_script
from formats import checkpoint, hf
from formats import gguf as gguf_file
from formats.files import atomic_folder, file_sha256, read_json, sibling_path
from formats.gguf_tokenizer import vocabulary
from formats.model_card import Card
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from modeling import ternary
from modeling.devices import DTYPES


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = "out/dpo"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    format: Literal["hf", "gguf", "ternary"] = "hf"  # what to write
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # hf: of the weights
    quantize: str = "q8_0"  # gguf: types with commas between: f32, f16, bf16, q8_0, q6_k, q4_k_m
    out: str | None = None  # folder to write; None: exports/<name>-<format>
    name: str | None = None  # in the card and of gguf files; None: that of the model's folder
    license: str | None = None  # for the card, as the hub spells it: mit, apache-2.0, ..; None: unsaid
    results: str | None = None  # for the card, a results.json of eval.py; None: that beside the model, if any
    overwrite: bool = False  # replace an export made from other inputs

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in gguf_file.KINDS]:
            known = ", ".join(gguf_file.KINDS)
            raise UserError(f"quantize={self.quantize}: {unknown[0]!r} is none of {known}")
        if len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"quantize={self.quantize}: names a type twice")
        if self.name is not None and Path(self.name).name != self.name:
            raise UserError(f"name={self.name}: must be the name of a file, without a folder")

    @property
    def kinds(self) -> list[str]:
        return self.quantize.split(",")

    @property
    def needs_float16(self) -> bool:
        """Whether something is stored as float16: weights, or the scales of quantised ones."""
        if self.format == "gguf":
            return not set(self.kinds) <= {"f32", "bf16"}
        return self.format == "hf" and self.dtype == "float16"

    @property
    def title(self) -> str:
        """The model's name: that given, else that of its folder, of a folder inside a run the run's."""
        path = Path(self.model).resolve() if Path(self.model).exists() else Path(self.model)
        is_inside = checkpoint.NAME.fullmatch(path.name) or path.name == "merged"
        return self.name or (path.parent.name if is_inside else path.name)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"exports/{self.title}-{self.format}")


class Source:
    """The model that is exported: its folder, configuration and tokenizer, and, when asked for, weights."""

    def __init__(self, cfg: ExportConfig):
        """UserError, by name, for what the format cannot hold."""
        self.cfg, self.folder = cfg, hf.find_folder(cfg.model)
        self.config, self.tokenizer = GPTConfig.read(self.folder), Tokenizer.load(self.folder)
        ends = hf.end_ids(self.folder)
        ends = (ends if len(ends) > 1 else ends[0]) if ends else self.tokenizer.end_ids
        self.ids = hf.special_token_ids(ends, self.tokenizer.bos_id)
        self.vocabulary: dict[str, Any] = {}
        if cfg.format == "hf" and hf.architecture(self.config) == "nanollama":
            raise UserError(f"format=hf: transformers has no architecture with {hf.unusual(self.config)}"
                            + "; --format=ternary packs it" * self.config.ternary)
        if cfg.format == "gguf":
            gguf_file.require_supported(self.config)
            self.vocabulary = vocabulary(self.tokenizer, self.config.vocab_size, cfg.model)
        if cfg.format == "ternary" and not self.config.ternary:
            raise UserError(f"format=ternary: {cfg.model} has no ternary weights (--ternary=True gives)")

    def weights(self) -> GPT:
        """The model in float32. UserError for a weight that is no number, or too large to be stored so."""
        model = GPT.from_pretrained(self.folder).eval()
        limit = torch.finfo(torch.float16 if self.cfg.needs_float16 else torch.bfloat16).max
        for name, parameter in model.named_parameters():
            if not parameter.detach().abs().max() <= limit:  # so written that NaN is caught
                raise UserError(f"{self.folder}: {name}: a weight is beyond {limit:.5g} or no number")
        return model


# ---- The card ---------------------------------------------------------------------------------------------

HOW_TO_USE = {"hf": """\
```python
from transformers import pipeline

generate = pipeline("text-generation", model="{name}")  # this folder, or its name on the hub
print(generate({prompt}, max_new_tokens=64)[0]["generated_text"])
```""", "gguf": """\
```sh
{llama} -m {name}-{kind}.gguf
llama-server --jinja -m {name}-{kind}.gguf
```""", "ternary": """\
The blocks' weights are -1, 0 or 1 times a scale, packed to 2 bits each. transformers has no such model;
nanollama has:

```sh
python sample.py {our_words} --model={name}  # this folder, or its name on the hub
```"""}
IF_IT_CHATS = {"prompt": '[{"role": "user", "content": "12 * 30?"}]', "our_words": "--chat=True",
               "llama": "llama-cli --jinja --special"}  # special: thoughts and tool calls are seen
IF_NOT = {"prompt": '"import os"', "our_words": '--prompt="import os"',
          "llama": 'llama-completion -no-cnv -p "import os" -n 64'}


def card_text(cfg: ExportConfig, source: Source) -> str:
    with torch.device("meta"):
        parameters = GPT(source.config).num_parameters()
    library = {"hf": "transformers", "gguf": "gguf", "ternary": "nanollama"}[cfg.format]
    card = Card(cfg.title, cfg.model, source.folder, source.config, source.tokenizer, cfg.license, library,
                cfg.results)
    words = IF_IT_CHATS if "chat_template" in source.tokenizer.settings else IF_NOT
    return card.text(parameters, HOW_TO_USE[cfg.format].format(name=cfg.title, kind=cfg.kinds[0], **words))


# ---- Formats ----------------------------------------------------------------------------------------------

def state_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_hf(folder: Path, cfg: ExportConfig, source: Source) -> str:
    model = source.weights()
    hf.save_folder(folder, source.config, state_of(model), source.ids, DTYPES[cfg.dtype])
    source.tokenizer.save(folder)
    return f"{model.num_parameters():,} weights in {cfg.dtype}"


def write_gguf(folder: Path, cfg: ExportConfig, source: Source) -> str:
    state = state_of(source.weights())
    described = {"general.name": cfg.title, "general.type": "model"} | source.vocabulary
    described |= {"general.license": cfg.license} if cfg.license else {}
    tables = []
    for kind in cfg.kinds:
        path = folder / f"{cfg.title}-{kind}.gguf"
        placed = gguf_file.write(path, source.config, state, described, kind)
        tables.append(f"{path.name}\n{gguf_file.type_table(placed)}")
    hf.write_config(folder, source.config, source.ids)  # llama.cpp needs the file alone, our loader these
    source.tokenizer.save(folder)
    return "\n".join(tables)


def write_ternary(folder: Path, cfg: ExportConfig, source: Source) -> str:
    model = source.weights()
    state, plain, packed = state_of(model), 0, 0
    for name, module in model.named_modules():
        if isinstance(module, ternary.TernaryLinear):
            codes, scale = (tensor.detach() for tensor in module.codes_and_scale())
            state |= {f"{name}.weight": ternary.pack_codes(codes), f"{name}.weight_scale": scale}
            plain += 2 * codes.numel()
            packed += state[f"{name}.weight"].numel() + 4  # and a float32
    hf.save_folder(folder, source.config, state, source.ids, packing=ternary.PACKING)
    source.tokenizer.save(folder)
    return f"ternary matrices: {packed:,} bytes, {packed / plain:.4f} of float16's"


WRITERS: dict[str, Callable[[Path, ExportConfig, Source], str]] = {
    "hf": write_hf, "gguf": write_gguf, "ternary": write_ternary}


# ---- The folder -------------------------------------------------------------------------------------------

def is_done(folder: Path, inputs: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds an export of these inputs, intact. UserError where it holds something else."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_json(folder / "manifest.json")
    if "export" not in manifest:
        raise UserError(f"out={folder}: holds a checkpoint; give an export a folder of its own")
    before = manifest["export"]
    differing = [key for key, value in inputs.items() if before.get(key) != value]
    if not differing and checkpoint.find_corruption(folder, model_only=True) is None:
        return True
    if differing and not overwrite:
        raise UserError(f"{folder}: made from other inputs ({', '.join(differing)} differ); --overwrite=True "
                        "replaces it, --out= makes another")
    return False


def main(argv: list[str]) -> int:
    cfg, given = configure(ExportConfig, argv, usage=__doc__)
    for key, format in (("dtype", "hf"), ("quantize", "gguf")):
        if key in given and cfg.format != format:
            raise UserError(f"{given[key]}: {key} is of --format={format}")
    source = Source(cfg)
    card = card_text(cfg, source)
    told = card.rpartition("## Origin")[0]  # the commit and the packages there are no reason to export anew
    inputs = {key: getattr(cfg, key) for key in ("format", "dtype", "quantize", "license")}
    inputs |= {"name": cfg.title, "card": hashlib.sha256(told.encode()).hexdigest(),
               "model": {path.name: file_sha256(path) for path in sorted(source.folder.iterdir())
                         if path.is_file() and path.name not in ("manifest.json", "README.md")}}
    if source.folder.resolve() == cfg.folder.resolve():
        raise UserError(f"out={cfg.folder}: is the model itself; give another")
    if is_done(cfg.folder, inputs, cfg.overwrite):
        shutil.rmtree(sibling_path(cfg.folder, "old"), ignore_errors=True)  # of one that was killed at the very end
        print(f"{cfg.folder} is there already, made from the same")
        return 0
    try:
        with atomic_folder(cfg.folder, "manifest.json", "export") as beside:
            report = WRITERS[cfg.format](beside, cfg, source)
            (beside / "README.md").write_text(card, encoding="utf-8")
            checkpoint.write_manifest(beside, export=inputs)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={cfg.folder}: could not be written ({error})") from error
    print(report)
    for path in sorted(cfg.folder.iterdir()):
        print(f"{path.stat().st_size:14,} bytes  {path}")
    return 0


if __name__ == "__main__":
    run_script(main)
