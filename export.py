"""Export a model: a Hugging Face folder, GGUF files for llama.cpp, or packed ternary weights.

    python export.py --model=out/dpo                                          # bfloat16, exports/dpo-hf
    python export.py --model=out/dpo --format=gguf --quantize=q8_0,q4_k_m --out=exports/mine
    python export.py --model=out/ternary --format=ternary                     # 2 bits per weight

Reads every model folder that the other scripts read; an adapter is merged into its base. The other scripts
can read the export too, one of several GGUF files by its path, so eval.py can measure exactly what is
published. Writes a folder that is complete or absent: the model's files, README.md (the model card: data,
settings, scores, hashes) and manifest.json (the sha256 of each file). The same command again does nothing if
the export is intact. If the inputs have changed, the command stops unless --overwrite=True is given.

    hf        config.json, model.safetensors, tokenizer.json, ..       what transformers loads
    gguf      <name>-<type>.gguf, one per type in --quantize           f32, f16, bf16, q8_0, q6_k, q4_k_m
    ternary   the hf layout; each ternary matrix as 2 bits per weight and one scale

A model that a format cannot hold is refused before anything is written; the error names the setting. GGUF
takes llama, qwen2, qwen3 and gpt2 models with a byte-level BPE, and no ternary weights.
Left out: uploading, models split into several files, importance matrices.
"""

import hashlib
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from configurator import UserError, configure, run_script
from formats import checkpoint, hf
from formats import gguf as gguf_file
from formats.files import atomic_folder, file_sha256, read_json, require_utf8_name, sibling_path
from formats.gguf_tokenizer import vocabulary
from formats.model_card import Exported, card
from formats.tokenizer import Tokenizer
from formats.weights import state_of
from model import GPT, GPTConfig
from modeling import ternary
from modeling.devices import DTYPES


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    model: str = "out/dpo"  # model folder, out_dir (best checkpoint, else the last), .gguf or hub id
    format: Literal["hf", "gguf", "ternary"] = "hf"  # what to write
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the weights; for format=hf
    quantize: str = "q8_0"  # comma-separated types for format=gguf: f32, f16, bf16, q8_0, q6_k, q4_k_m
    out: str | None = None  # folder to write; None is exports/<name>-<format>
    name: str | None = None  # name in the card and of GGUF files; None is the name of the model's folder
    license: str | None = None  # the card's license by the hub's name (mit, apache-2.0, ..); None states none
    overwrite: bool = False  # replace an export that was made from other inputs

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in gguf_file.KINDS]:
            known = ", ".join(gguf_file.KINDS)
            raise UserError(f"quantize={self.quantize}: {unknown[0]!r} is not a type (choose from {known})")
        if self.name is not None and (Path(self.name).name != self.name or self.name == ".."):
            raise UserError(f"name={self.name}: must be a plain name, without a folder")

    # The next three are derived from the keys; they are properties, so they are not keys themselves.
    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(self.quantize.lower().split(",")))  # llama.cpp writes Q4_K_M

    @property
    def title(self) -> str:
        """The name of the model: --name, or the name of its folder, or of the run that the folder is in."""
        # resolve() turns "." into a name; a hub id has nothing to resolve.
        path = Path(self.model).resolve() if Path(self.model).exists() else Path(self.model)
        path = path.with_suffix("") if path.suffix == ".gguf" else path
        # out/dpo/step_000060 and out/dpo/merged are both called dpo.
        is_inside_run = checkpoint.NAME.fullmatch(path.name) or path.name == "merged"
        return self.name or (path.parent.name if is_inside_run else path.name)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"exports/{self.title}-{self.format}")


class Source:
    """The model to export: its folder, configuration, tokenizer and, on request, its weights."""

    def __init__(self, cfg: ExportConfig):
        """Raises UserError for a model that the format cannot hold, before anything large is read."""
        self.cfg, self.folder = cfg, hf.find_folder(cfg.model)
        require_utf8_name(cfg.title, "give another with --name=")
        self.config, self.tokenizer = GPTConfig.read(self.folder), Tokenizer.load(self.folder)
        self.tokenizer.require_rows(self.config.vocab_size, cfg.model)
        # The model's own EOS ids win over the tokenizer's. One id is written as a number, several as a list.
        ids = hf.end_ids(self.folder)
        end_ids = ids[0] if len(ids) == 1 else ids or self.tokenizer.end_ids
        self.ids = hf.special_token_ids(end_ids, self.tokenizer.bos_id)
        self.vocabulary: dict[str, Any] = {}
        # Each format refuses here, so that a mistake costs no time and leaves no file.
        if cfg.format == "hf" and hf.architecture(self.config) == "nanollama":
            hint = "; use --format=ternary" if self.config.ternary else ""
            raise UserError(f"format=hf: transformers has no model with {hf.unusual(self.config)}{hint}")
        if cfg.format == "gguf":
            gguf_file.require_supported(self.config)
            self.vocabulary = vocabulary(self.tokenizer, self.config.vocab_size, cfg.model)
        if cfg.format == "ternary" and not self.config.ternary:
            raise UserError(f"format=ternary: {cfg.model} has no ternary weights (train.py --ternary=True)")

    def weights(self) -> GPT:
        """The model in float32. Raises UserError for a weight that is not finite or too large to store."""
        # float32, whatever the export's dtype: a quantizer must not start from rounded weights.
        model = GPT.from_pretrained(self.folder).eval()
        stored = self.cfg.kinds if self.cfg.format == "gguf" else [self.cfg.dtype]  # ternary: bfloat16
        # Only these have float32's range. Blocks of q8_0 and of the K-quants have float16 scales.
        is_wide = set(stored) <= {"f32", "bf16", "float32", "bfloat16"}
        limit = torch.finfo(torch.bfloat16 if is_wide else torch.float16).max
        for name, parameter in model.named_parameters():
            if not parameter.detach().abs().max() <= limit:  # not "> limit", which is False for NaN
                raise UserError(f"{self.folder}: {name}: a weight is larger than {limit:.5g} or not a number")
        return model


# ---- Model card -------------------------------------------------------------------------------------------

def card_text(cfg: ExportConfig, source: Source) -> str:
    """The content of README.md."""
    with torch.device("meta"):  # counts parameters without allocating them
        parameters = GPT(source.config).num_parameters()
    return card(Exported(cfg.model, source.folder, source.config, source.tokenizer, parameters, cfg.title,
                         cfg.format, cfg.kinds[0], cfg.license))


# ---- Formats ----------------------------------------------------------------------------------------------
# Each writer puts the weights and config.json into a folder, and returns a report to print.

def write_hf(folder: Path, cfg: ExportConfig, source: Source, model: GPT) -> str:
    hf.save_folder(folder, source.config, state_of(model), source.ids, DTYPES[cfg.dtype])
    return f"{model.num_parameters():,} weights in {cfg.dtype}"


def write_gguf(folder: Path, cfg: ExportConfig, source: Source, model: GPT) -> str:
    metadata = {"general.name": cfg.title, "general.type": "model"} | source.vocabulary
    metadata |= {"general.license": cfg.license} if cfg.license else {}
    tables = []
    for kind in cfg.kinds:  # the weights are loaded once for all types
        path = folder / f"{cfg.title}-{kind}.gguf"
        infos = gguf_file.write(path, source.config, state_of(model), metadata, kind)
        tables.append(f"{path.name}\n{gguf_file.type_table(infos)}")
    # The GGUF file is complete. Pages of the hub show the settings that config.json has.
    hf.write_config(folder, source.config, source.ids)
    return "\n".join(tables)


def write_ternary(folder: Path, cfg: ExportConfig, source: Source, model: GPT) -> str:
    # Embeddings and norms stay float32; only the layers that compute with ternary weights are packed.
    state, float16_bytes, packed_bytes = state_of(model), 0, 0
    for name, module in model.named_modules():
        if isinstance(module, ternary.TernaryLinear):
            # Also exact for weights that were loaded from a packed folder: they are rounded already.
            codes, scale = (tensor.detach() for tensor in module.codes_and_scale())
            state |= {f"{name}.weight": ternary.pack_codes(codes), f"{name}.weight_scale": scale}
            float16_bytes += 2 * codes.numel()
            packed_bytes += state[f"{name}.weight"].numel() + 4  # the scale is one float32
    hf.save_folder(folder, source.config, state, source.ids, packing=ternary.PACKING)
    return f"ternary matrices: {packed_bytes:,} bytes, {packed_bytes / float16_bytes:.4f} of float16's"


WRITERS = {"hf": write_hf, "gguf": write_gguf, "ternary": write_ternary}


# ---- Output folder ----------------------------------------------------------------------------------------

def inputs_of(cfg: ExportConfig, source: Source, text: str) -> dict[str, Any]:
    """Everything that decides the content of an export. It is stored in manifest.json and compared there.

    text: the model card.
    """
    # The section "Origin" names the commit and the versions of packages. They are no reason to export again.
    content = text.rpartition("## Origin")[0]
    inputs = {key: getattr(cfg, key) for key in ("format", "dtype", "license")}
    inputs["quantize"] = ",".join(cfg.kinds)
    # manifest.json and README.md describe the model; they are no part of it.
    files = [source.folder] if source.folder.is_file() else [
        path for path in sorted(source.folder.iterdir())
        if path.is_file() and path.name not in ("manifest.json", "README.md")]
    return inputs | {"name": cfg.title, "card": hashlib.sha256(content.encode()).hexdigest(),
                     "model": {path.name: file_sha256(path) for path in files}}


def is_done(folder: Path, inputs: dict[str, Any], overwrite: bool) -> bool:
    """True if the folder has an intact export of these inputs. Raises UserError if it has something else."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = read_json(folder / "manifest.json")
    if "export" not in manifest:  # checkpoints have a manifest too: never replace one
        raise UserError(f"out={folder}: holds a checkpoint; give the export a folder of its own")
    # Keys, not values: the message must stay one line.
    differing = [key for key, value in inputs.items() if manifest["export"].get(key) != value]
    if differing and not overwrite:
        raise UserError(f"{folder}: made from other inputs ({', '.join(differing)} differ); --overwrite=True "
                        "replaces it, --out= writes another folder")
    # A damaged export of the same inputs is made again without asking.
    return not differing and checkpoint.find_corruption(folder, model_only=True) is None


def next_commands(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The commands that use an export: llama.cpp's for GGUF files, and our own."""
    jinja, chat = (" --jinja", " --chat=True") if "chat_template" in tokenizer.settings else ("", "")
    files = sorted(folder.glob("*.gguf"))
    model = files[0] if len(files) > 1 else folder
    return [*(f"llama-server -m {shlex.quote(str(file))}{jinja}" for file in files),
            f"python sample.py --model={shlex.quote(str(model))}{chat}"]


def main(argv: list[str]) -> None:
    cfg, provenance = configure(ExportConfig, argv, usage=__doc__)
    # A key that the format ignores is a mistake, but only if the user set it: all keys have a default.
    for key, format in (("dtype", "hf"), ("quantize", "gguf")):
        if key in provenance and cfg.format != format:
            raise UserError(f"{provenance[key]}: {key} only works with --format={format}")
    source = Source(cfg)
    if hf.home(source.folder).resolve() == cfg.folder.resolve():
        raise UserError(f"out={cfg.folder}: is the model itself; give another folder")
    text = card_text(cfg, source)
    inputs = inputs_of(cfg, source, text)
    if is_done(cfg.folder, inputs, cfg.overwrite):
        # If an earlier process was killed after its last rename, the export it replaced is still here.
        shutil.rmtree(sibling_path(cfg.folder, "old"), ignore_errors=True)
        print(f"{cfg.folder} exists already, made from the same inputs")
        return
    try:
        # The folder is built under a temporary name and renamed when the block ends.
        with atomic_folder(cfg.folder, marker="manifest.json", kind="export") as folder:
            report = WRITERS[cfg.format](folder, cfg, source, source.weights())
            source.tokenizer.save(folder)
            (folder / "README.md").write_text(text, encoding="utf-8")
            checkpoint.write_manifest(folder, export=inputs)  # last: it marks a complete folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={cfg.folder}: could not be written ({error})") from error
    print(report)  # only now: an export that failed prints no sizes
    for path in sorted(cfg.folder.iterdir()):
        print(f"{path.stat().st_size:14,} bytes  {path}")
    print("\nnext    " + "\n        ".join(next_commands(cfg.folder, source.tokenizer)))


if __name__ == "__main__":
    run_script(main)
