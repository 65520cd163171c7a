"""Wrong command lines of every script and tool: exit code 2, one or two lines on stderr, never a traceback.

Each test runs a program with a valid command line (VALID) and a wrong argument at the end (KINDS). The
message must name the wrong key, its value or the file. The programs run in this process. No command line may
train, and none may change a model or a data set.
"""

import importlib
import shlex
import sys

import pytest

import loop
from configurator import run_script
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from prepare import PrepareConfig, prepare
from tests.conftest import ROOT, busy_model, tiny_config

SET_UP = loop.TrainState.__init__  # a fast test replaces it
SIZES = "--n_layer=1 --n_embd=32 --n_head=2 --block_size=32"
VALID = {
    "prepare": "--source=file.txt --out=made --num_proc=1 --vocab_size=300",
    "train": f"--dataset=text --out_dir=run --device=cpu {SIZES}",
    "distill": f"--dataset=text --out_dir=run --device=cpu --teacher=base {SIZES}",
    "sft": "--dataset=chats --out_dir=run --device=cpu --init_from=model --block_size=64",
    "dpo": "--dataset=pairs --out_dir=run --device=cpu --init_from=model --block_size=256",
    "grpo": "--out_dir=run --device=cpu --init_from=model --block_size=256",
    "verifier": "--out_dir=run --device=cpu --init_from=model --block_size=256",
    "sample": "--model=base --device=cpu --max_new_tokens=2",
    "serve": "--model=model --port=0 --device=cpu",
    "eval": "--model=base --device=cpu --tasks=perplexity --data=perplexity=file.txt --limit=1 "
            "--out_dir=scores",
    "export": "--model=base --out=exported",
    "tools.ablate": "--changes=n_layer=1 --out_dir=sweep",
    "tools.attention": "--model=base --out=attention.png",
    "tools.cache_teacher": "--teacher=base --dataset=text --block_size=32",
    "tools.compare": "base base --dataset=text --eval_tokens=64 --max_new_tokens=2 --out=page.md",
    "tools.errors": "answers.jsonl --out=errors.md",
    "tools.finetune_seq2seq": "--model=nosuch --source=summaries.jsonl --out_dir=seq2seq",
    "tools.get_smollm2": "--out=smollm2",
    "tools.make_pairs": "--model=model --out=own.jsonl --num_problems=1 --num_samples=1 --max_new_tokens=2 "
                        "--device=cpu",
    "tools.plot": "log --out=curves.png",
    "tools.report": "measured --out=report --pdf=False",
    "tools.search_layers": "--teacher=base --student=base --dataset=text --block_size=32",
    "tools.sweep": "--grid=seed=1 --out_dir=sweep",
    "tools.synthesize": "--teacher=base --out=free --tokens=200 --length=8 --val_fraction=0.3 --device=cpu",
    "tools.task_table": "--model=model --tasks=sst2 --out_dir=sweep",
}
TRAINING = "train distill sft dpo grpo verifier"
TOKENIZED = "train distill sft dpo"  # programs that train on a data set of prepare.py
MODELS = "sample eval export serve tools.attention tools.make_pairs"
TEACHERS = "distill tools.cache_teacher tools.search_layers tools.synthesize"
ALL = " ".join(VALID)

# {kind: [(programs, wrong arguments), ..]}; " + " joins two arguments that are wrong together.
KINDS = {
    # ---- Keys
    "unknown key": [
        (ALL, ["--nosuch=1"]),
    ],
    "unknown flag": [
        (ALL, ["--nosuch"]),
    ],
    "no key": [
        ("train sample eval", ["--=1", "--"]),
    ],
    "misspelled key": [
        (TRAINING, ["--max_step=3", "--learning_rat=1"]),
        ("sample", ["--temprature=1"]),
    ],
    "key with dashes": [
        (TRAINING, ["--max-steps=3"]),
        ("sample", ["--top-k=3"]),
        ("prepare", ["--num-proc=1"]),
    ],
    "key of another tool": [
        (TRAINING, ["--lr=1e-3", "--epochs=2", "--batch_size=8", "--ctx_len=64"]),
        ("sample", ["--start=x", "--n=3"]),
        ("eval", ["--num_fewshot=3"]),
        ("export", ["--outtype=f16"]),
        ("prepare", ["--num_workers=2"]),
        ("serve", ["--n_ctx=64", "--max_tokens=3", "--out_dir=base"]),
        ("grpo", ["--num_generations=4", "--epsilon=0.1", "--reward_funcs=x"]),
        ("tools.finetune_seq2seq", ["--lr=1e-3", "--lora_r=8", "--model_name=x", "--num_train_epochs=1"]),
        ("tools.ablate tools.search_layers tools.get_smollm2", ["--output_dir=x"]),
    ],
    "key of another script": [
        ("train", ["--lora_rank=8", "--beta=0.1", "--prompt=x"]),
        ("sft", ["--n_layer=3"]),
        ("sample", ["--learning_rate=1"]),
        ("eval", ["--max_steps=3"]),
    ],
    "key in unicode": [
        ("train sample prepare", ["--größe=3", "--max_steрs=3"]),
    ],
    "key without value": [
        ("train", ["--max_steps", "--dataset", "--lr_multipliers"]),
        ("sample", ["--model"]),
        ("prepare", ["--source"]),
        ("export", ["--format"]),
        ("serve", ["--port"]),
        ("tools.ablate tools.errors tools.get_smollm2", ["--out"]),
        ("tools.attention", ["--layer"]),
        ("tools.task_table", ["--tasks"]),
        ("tools.search_layers", ["--steps"]),
        ("tools.finetune_seq2seq", ["--source"]),
    ],
    "value after a space": [
        ("train", ["--max_steps + 3", "--compile + true"]),
        ("sample", ["--prompt + hello"]),
    ],
    "one dash": [
        ("train sample eval export", ["-m + base"]),
    ],
    "empty value": [
        ("tools.ablate tools.task_table tools.search_layers tools.finetune_seq2seq", ["--out_dir="]),
        ("tools.errors tools.get_smollm2 tools.attention", ["--out="]),
        ("serve", ["--host="]),
        (TRAINING, ["--dataset=", "--out_dir=", "--max_steps=", "--optimizer="]),
        (MODELS, ["--model="]),
        ("prepare", ["--source=", "--tokenizer="]),
        ("tools.sweep", ["--grid="]),
    ],
    "value of nanoGPT": [
        (TRAINING, ["--init_from=scratch", "--init_from=resume"]),
    ],
    # ---- Types
    "word for a number": [
        (TRAINING, ["--max_steps=many", "--learning_rate=fast"]),
        ("sample", ["--top_k=all"]),
        ("prepare", ["--max_tokens=1M"]),
        ("eval", ["--limit=all"]),
        ("serve", ["--port=http", "--slots=many"]),
        ("tools.ablate tools.task_table", ["--seeds=three"]),
        ("tools.attention", ["--layer=first"]),
        ("tools.search_layers", ["--steps=few"]),
        ("tools.finetune_seq2seq", ["--lora_rank=none"]),
    ],
    "fraction for a whole number": [
        (TRAINING, ["--max_steps=1.5"]),
        ("sample", ["--num_samples=0.5"]),
        ("serve", ["--slots=1.5"]),
        ("grpo", ["--group_size=2.5"]),
        ("tools.ablate tools.task_table", ["--seeds=1.5"]),
    ],
    "number for a boolean": [
        (TRAINING, ["--wandb=1"]),
        ("sample", ["--chat=0"]),
        ("prepare", ["--strict=2"]),
    ],
    "word for a boolean": [
        (TRAINING, ["--overwrite=yes", "--compile=on"]),
        ("export", ["--overwrite=y"]),
    ],
    "boolean for a number": [
        (TRAINING, ["--seed=True"]),
        ("eval", ["--limit=False"]),
    ],
    "unknown choice": [
        (TRAINING, ["--optimizer=sgd", "--schedule=step", "--dtype=fp16", "--dtype=BFLOAT16"]),
        ("export", ["--format=onnx"]),
        ("prepare", ["--kind=image"]),
        ("dpo", ["--loss=kto"]),
        ("grpo", ["--advantage=gae", "--reference=gpu"]),
        ("serve", ["--dtype=fp16"]),
        ("distill", ["--divergence=l2"]),
        ("tools.synthesize", ["--kind=other"]),
    ],
    "wrong container": [
        ("train", ["--lr_multipliers=[1]", "--stages={}", "--stages=3", "--rope_scaling=[]"]),
        ("sample", ["--stop=[1]", "--stop=['']"]),
    ],
    "expression": [
        ("train", ["--max_steps=2**3", "--stages=[dict(steps=3)]", "--max_steps=__import__('os').getpid()"]),
    ],
    "brackets without end": [
        ("train", ["--stages=[[[[", "--lr_multipliers={'a'", "--stages=" + "[" * 3000]),
    ],
    "None where none is allowed": [
        ("train", ["--max_steps=None", "--seed=None", "--optimizer=None"]),
    ],
    # ---- Numbers
    "zero": [
        (TRAINING, ["--max_steps=-1", "--global_batch_size=0", "--micro_batch_size=0", "--log_interval=0"]),
        ("train distill", ["--n_layer=0", "--n_head=0"]),
        ("sample", ["--num_samples=0"]),
        ("prepare", ["--vocab_size=0", "--num_proc=0"]),
        ("tools.cache_teacher tools.search_layers", ["--block_size=0"]),
        ("grpo", ["--eval_prompts=0", "--temperature=0", "--updates_per_rollout=0"]),
        ("verifier", ["--num_problems=0", "--num_samples=0"]),
        ("serve", ["--slots=0", "--max_waiting=0", "--timeout=0", "--context_length=0"]),
        ("tools.ablate", ["--seeds=0"]),
        ("tools.task_table", ["--seeds=0", "--shots=0", "--limit=0"]),
        ("tools.finetune_seq2seq", ["--max_steps=0", "--batch_size=0", "--summary_tokens=0"]),
    ],
    "negative": [
        (TRAINING, ["--learning_rate=-1", "--eval_interval=-1", "--seed=-1", "--warmup_steps=-5"]),
        ("sample", ["--temperature=-1", "--max_new_tokens=-1", "--top_k=-1"]),
        ("dpo", ["--beta=-0.1"]),
        ("prepare", ["--max_tokens=-1", "--val_fraction=-0.1"]),
        ("eval", ["--shots=-1"]),
        ("grpo", ["--kl_weight=-1", "--calculator=-1"]),
        ("serve", ["--port=-1", "--temperature=-1"]),
        ("tools.attention", ["--layer=-1", "--head=-1"]),
        ("tools.search_layers", ["--steps=-1"]),
        ("tools.finetune_seq2seq", ["--lora_rank=-1", "--seed=-1"]),
    ],
    "NaN": [
        (TRAINING, ["--learning_rate=nan", "--weight_decay=NaN"]),
        ("sample serve", ["--temperature=nan"]),
        ("serve", ["--timeout=nan"]),
        ("tools.finetune_seq2seq", ["--learning_rate=nan"]),
    ],
    "infinite": [
        (TRAINING, ["--learning_rate=inf", "--grad_clip=1e400"]),
        ("sample", ["--top_p=inf"]),
    ],
    "huge": [
        (TRAINING, ["--max_steps=1e30", "--seed=999999999999999999999999999999999999999999999999999999999999",
                    "--max_steps=" + "9" * 5000]),
        ("sample", ["--top_k=1e300", "--max_new_tokens=1e12"]),
        ("prepare", ["--vocab_size=1e9"]),
    ],
    "out of range": [
        (TRAINING, ["--beta1=1", "--beta2=1.5"]),
        ("train distill", ["--dropout=1.5"]),
        ("sample", ["--top_p=1.5", "--min_p=2", "--repetition_penalty=0"]),
        ("distill", ["--alpha=2", "--on_policy=3", "--jsd_beta=1", "--temperature=0"]),
        ("dpo", ["--label_smoothing=0.5", "--beta=0"]),
        ("sft", ["--lora_dropout=1"]),
        ("grpo verifier", ["--calculator=2"]),
        ("grpo", ["--group_size=1", "--lora_dropout=0.1 + --lora_rank=2"]),
        ("serve", ["--port=70000", "--slots=1e9", "--top_p=2", "--best_of=2", "--host=0.0.0.0"]),
        ("tools.attention", ["--layer=9", "--head=9", "--prompt=x"]),
        ("prepare", ["--val_fraction=1", "--vocab_size=10"]),
        ("tools.synthesize", ["--val_fraction=1", "--tokens=0"]),
    ],
    "sizes that do not divide": [
        ("train distill", ["--n_head=3", "--n_kv_head=3", "--head_dim=3"]),
        (TRAINING, ["--micro_batch_size=5", "--global_batch_size=7"]),
    ],
    # ---- Keys that contradict each other
    "contradiction": [
        ("train", ["--position=learned + --rope_scaling={'rope_type':'yarn','factor':2.0}",
                   "--stages=[{'steps':3},{'steps':3}] + --max_steps=4", "--init_from=base + --n_layer=4"]),
        ("sample", ["--chat=True + --prompt=x", "--prompt=x + --prompt_file=rows.jsonl",
                    "--system=x + --prompt=y", "--chat=True + --num_samples=2"]),
        ("prepare", ["--kind=text + --keys=question=q", "--kind=chat + --text_key=body",
                     "--tokenizer=gpt2 + --vocab_size=500", "--kind=text + --source=tools"]),
        ("grpo", ["--reference=adapter_off", "--parallel=fsdp"]),
        ("verifier", ["--parallel=fsdp", "--merge=True + --lora_rank=2", "--stages=[{'steps':3}]"]),
        ("serve", ["--sinks=2 + --window=100000"]),
        ("sft dpo", ["--merge=True + --lora_rank=0", "--quantize_base=nf4 + --lora_rank=0"]),
        ("dpo", ["--loss=ipo + --label_smoothing=0.1", "--reference=adapter_off + --lora_rank=0",
                 "--lora_rank=4 + --lora_dropout=0.1"]),
        ("distill", ["--cache=topk + --on_policy=0.5", "--cache=topk + --divergence=mse",
                     "--student_layers=first:1 + --init_from=base"]),
        ("export", ["--format=hf + --quantize=q8_0", "--format=gguf + --dtype=float16"]),
    ],
    "stage": [
        ("train", ["--stages=[3]", "--stages=[{}]", "--stages=[{'steps':0}]", "--stages=[{'steps':'3'}]",
                   "--stages=[{'steps':3,'epochs':1}]", "--stages=[{'epochs':-1}]",
                   "--stages=[{'steps':3,'lr':1}]", "--stages=[{'steps':3,'optimizer':'adamw'}]",
                   "--stages=[{'steps':3,'rope_theta':[1]}]", "--stages=[{1:3}]",
                   "--stages=[{'steps':3,'learning_rate':'x'}]"]),
    ],
    "pattern": [
        ("train", ["--lr_multipliers={'(':1}",
                   "--lr_multipliers={'embed':'x'}", "--lr_multipliers={'embed':-1}",
                   "--lr_multipliers={3:1}"]),
        (TRAINING, ["--lr_multipliers={'nosuch':1}", "--lr_multipliers={'.':0}"]),
        ("sft", ["--lora_rank=2 + --lora_targets=(", "--lora_rank=2 + --lora_targets=nosuch"]),
    ],
    # ---- Names in a list
    "unknown name in a list": [
        ("eval", ["--tasks=nosuch", "--tasks=problems,nosuch", "--data=nosuch=file.txt"]),
        ("export", ["--format=gguf + --quantize=q9", "--format=gguf + --quantize=q8_0,"]),
        ("grpo verifier tools.make_pairs", ["--families=nosuch", "--families=add,"]),
        ("tools.task_table", ["--tasks=nosuch", "--tasks=sst2,", "--methods=zero,some"]),
        ("tools.ablate", ["--changes=n_layer", "--changes=-dpo.py", "--base=[3]", "--base=[]"]),
        ("distill", ["--student_layers=middle:2", "--student_layers=5", "--student_layers=first:9"]),
        ("tools.sweep", ["--grid=seed", "--grid==1", "--grid=a=1 b=1 c=1 d=1"]),
    ],
    "bad weight": [
        ("train", ["--dataset=text:0", "--dataset=text:-1", "--dataset=text:nan", "--dataset=,",
                   "--dataset=:1", "--dataset=text:inf"]),
    ],
    "bad name": [
        ("export", ["--name=a/b", "--name=.."]),
    ],
    "unknown device": [
        (TRAINING, ["--device=gpu"]),
        ("train sample", ["--device=cuda:99", "--device=meta"]),
        ("eval", ["--device=tpu"]),
    ],
    # ---- Paths
    "missing data set": [
        (TOKENIZED, ["--dataset=nosuch", "--dataset=data/nosuch", "--dataset=/nosuch"]),
        ("grpo tools.cache_teacher tools.compare tools.search_layers", ["--dataset=nosuch"]),
        ("tools.finetune_seq2seq", ["--source=nosuch", "--source=file.txt", "--source=rows.jsonl"]),
    ],
    "missing source": [
        ("prepare", ["--source=nosuch", "--source=nosuch/*.txt", "--source=file.txt,nosuch",
                     "--decontaminate=nosuch", "--tokenizer=nosuch/tokenizer.json"]),
    ],
    "missing model": [
        (MODELS, ["--model=nosuch/model", "--model=/nosuch/model"]),
        (TEACHERS, ["--teacher=/nosuch/model"]),
        ("train sft dpo grpo verifier", ["--init_from=/nosuch/model"]),
        ("serve", ["--compare=/nosuch/model", "--verifier=/nosuch/model"]),
        ("tools.search_layers", ["--student=/nosuch/model"]),
    ],
    "model that no hub has": [
        ("sample", ["--model=nosuch"]),
        ("sft", ["--init_from=nosuch/nosuch"]),
    ],
    "missing file": [
        ("sample", ["--prompt_file=nosuch.jsonl"]),
        ("tools.attention", ["--prompt_file=nosuch.txt"]),
        ("tools.errors", ["nosuch.jsonl"]),
        ("grpo", ["--reward=nosuch.py:score", "--reward=nosuch"]),
        ("tools.sweep", ["--script=nosuch.py"]),
        ("tools.compare", ["--prompts=nosuch.txt"]),
        ("eval", ["--data=perplexity=nosuch.txt", "--data=nosuch + --tasks=mmlu"]),
    ],
    "missing run": [
        ("tools.plot", ["nosuch", "empty", "base", "file.txt"]),
        ("tools.report", ["nosuch", "empty", "base"]),
    ],
    "file instead of a model": [
        (MODELS, ["--model=file.txt"]),
        (TEACHERS, ["--teacher=file.txt"]),
        ("train sft dpo grpo verifier", ["--init_from=file.txt"]),
    ],
    "file instead of a data set": [
        (TOKENIZED, ["--dataset=file.txt", "--dataset=data/text/meta.json"]),
        ("grpo", ["--dataset=file.txt", "--dataset=data/text/meta.json"]),
    ],
    "file instead of a folder": [
        (TRAINING, ["--out_dir=file.txt", "--out_dir=file.txt/run"]),
        ("prepare export tools.synthesize", ["--out=file.txt", "--out=file.txt/x"]),
        ("eval tools.finetune_seq2seq", ["--out_dir=file.txt"]),
        ("tools.get_smollm2", ["--out=file.txt", "--out=file.txt/x"]),
    ],
    "folder instead of a file": [
        ("sample tools.attention", ["--prompt_file=base"]),
        ("tools.errors", ["--out=empty"]),
        ("tools.compare", ["--prompts=base"]),
        ("tools.make_pairs", ["--out=empty"]),
        ("tools.plot", ["--out=empty"]),
        ("tools.compare", ["--out=empty"]),
    ],
    "data set instead of a model": [
        (MODELS, ["--model=data/text"]),
        (TEACHERS, ["--teacher=data/chats"]),
        ("train sft dpo grpo verifier", ["--init_from=data/text"]),
    ],
    "model instead of a data set": [
        (TOKENIZED, ["--dataset=base"]),
    ],
    "data set of another kind": [
        ("train", ["--dataset=chats", "--dataset=pairs"]),
        ("sft", ["--dataset=text"]),
        ("dpo", ["--dataset=chats"]),
        ("distill", ["--dataset=pairs"]),
        ("tools.cache_teacher", ["--dataset=pairs"]),
    ],
    "base without chat tokens": [
        ("tools.make_pairs", ["--model=base"]),
        ("grpo", ["--init_from=base"]),
        ("sample", ["--chat=True"]),
    ],
    "empty folder": [
        (MODELS, ["--model=empty"]),
        (f"{TOKENIZED} grpo", ["--dataset=empty"]),
        ("prepare", ["--source=empty"]),
    ],
    "occupied folder": [
        (TRAINING, ["--out_dir=data/text", "--out_dir=base"]),
        ("prepare export tools.synthesize tools.get_smollm2", ["--out=full", "--out=."]),
    ],
    "root folder": [
        (TRAINING, ["--out_dir=/"]),
        ("prepare export tools.synthesize tools.get_smollm2", ["--out=/"]),
    ],
    "very long path": [
        ("train", ["--out_dir=" + "x" * 300, "--dataset=" + "x" * 5000]),
        ("sample", ["--model=" + "x" * 5000]),
    ],
    "files that cannot be read": [
        ("prepare", ["--source=binary.txt", "--source=broken.jsonl", "--source=empty.txt",
                     "--source=noparquet.parquet", "--source=file.unknown"]),
        ("sample", ["--prompt_file=broken.jsonl", "--prompt_file=binary.txt", "--prompt_file=empty.txt"]),
        ("tools.compare", ["--prompts=binary.txt", "--prompts=empty.txt"]),
        ("tools.attention", ["--prompt_file=empty.txt"]),
        ("tools.errors", ["broken.jsonl", "binary.txt"]),
        ("grpo", ["--dataset=broken.jsonl", "--dataset=broken.jsonl + --task=sst2", "--task=gsm8k"]),
    ],
    # ---- Lengths
    "longer than the context": [
        ("sft dpo grpo verifier", ["--block_size=4096"]),
        ("distill", ["--block_size=4096"]),
        ("tools.cache_teacher", ["--block_size=4096"]),
    ],
    "longer than the data": [
        ("train", ["--block_size=100000"]),
    ],
    "not UTF-8": [
        ("sample", ["--prompt=\udcff", "--chat=True + --system=\udcff", "--model=\udcff"]),
        (TRAINING, ["--dataset=\udcff", "--out_dir=\udcff"]),
        ("serve", ["--api_key=\udcff"]),
        ("tools.ablate tools.task_table tools.search_layers tools.finetune_seq2seq", ["--out_dir=\udcff"]),
        ("tools.get_smollm2 tools.errors tools.attention", ["--out=\udcff"]),
        ("prepare", ["--source=\udcff"]),
    ],
    "unicode": [
        ("train", ["--dataset=größe", "--dataset=a\u2028b", "--optimizer=АdamW", "--max_steps=٣x"]),
        ("sample export", ["--model=模型/模型"]),
        ("prepare", ["--source=資料.txt"]),
    ],
    "line break in a value": [
        ("train", ["--dataset=a\nb", "--optimizer=a\nb"]),
        ("sample", ["--model=./a/\nb"]),
        ("prepare", ["--source=a\nb"]),
    ],
    "no rate": [
        (TRAINING, ["--min_lr=1", "--learning_rate=1e-400"]),
    ],
    "absurd size": [
        ("train distill", ["--vocab_size=1e15", "--n_embd=1e12", "--n_layer=1e9"]),
        (TRAINING, ["--global_batch_size=1e15 + --micro_batch_size=1e15", "--block_size=1e12"]),
        ("sample", ["--batch_size=1e15 + --num_samples=1e15"]),
        ("tools.synthesize", ["--length=1e15"]),
    ],
    "wrong for this model": [
        ("export", ["--format=ternary + --model=base"]),
        ("train", ["--vocab_size=300"]),
        ("distill", ["--layer_map=all + --hidden_weight=1", "--student_layers=last:3"]),
        ("sft", ["--dataset=data/chats:1,text:1"]),
    ],
    "missing cache": [
        ("distill", ["--cache=topk", "--cache=sample"]),
    ],
    "the model is the output": [
        ("export", ["--out=base"]),
        ("train", ["--init_from=base + --out_dir=base + --overwrite=True",
                   "--init_from=data/../base + --out_dir=base + --overwrite=True"]),
        ("sft dpo grpo verifier", ["--out_dir=model + --overwrite=True"]),
    ],
    "made from other inputs": [
        ("prepare", ["--out=data/text + --val_fraction=0.3", "--out=data/chats"]),
    ],
    "nothing to verify": [
        ("prepare", ["--verify=True + --out=nosuch", "--verify=True + --out=empty"]),
    ],
    "out of range in a task": [
        ("eval", ["--context_length=0", "--stride=0", "--compare=/nosuch/model", "--limit=0",
                  "--tasks=problems + --chat=True", "--stride=1e9"]),
    ],
    "cache": [
        ("tools.cache_teacher", ["--k=0", "--method=none", "--temperature=0", "--values=int8"]),
    ],
    # ---- Config files
    "missing config file": [
        (TRAINING, ["nosuch.py", "config/nosuch.py"]),
        ("sample serve tools.ablate tools.attention tools.get_smollm2 tools.finetune_seq2seq", ["nosuch.py"]),
        ("tools.search_layers tools.task_table", ["nosuch.py"]),
    ],
    "config file": [
        ("train", ["syntax.py", "binary.txt", "key.py", "type.py", "choice.py", "raises.py", "exits.py",
                   "imports.py", "returns.py", "zero.py", "bom.py", "latin.py", "deep.py", "file.txt",
                   "empty", "base", "function.py", "lr.py"]),
    ],
}
LINES = [(kind, program, argument) for kind, rows in KINDS.items() for programs, arguments in rows
         for program in programs.split() for argument in arguments]

FILES = {
    "measured/results.json": '{"models": [{"name": "a", "model": "a", "tasks": {}, "not_run": {}}], '
                             '"not_run": {}, "settings": {}}',
    "syntax.py": "max_steps = = 3\n", "key.py": "max_step = 3\n", "type.py": "max_steps = '3'\n",
    "choice.py": "optimizer = 'sgd'\n", "raises.py": "max_steps = 1 / 0\n", "exits.py": "raise SystemExit\n",
    "imports.py": "import nosuch\n", "returns.py": "return\n", "zero.py": "log_interval = 0\n",
    "bom.py": "\ufeffmax_step = 3\n", "deep.py": "stages = " + "[" * 300 + "]" * 300 + "\n",
    "function.py": "def helper():\n    return 3\n", "lr.py": "lr = 1e-3\n", "empty.txt": "",
    "broken.jsonl": '{"text": \n', "file.unknown": "text", "noparquet.parquet": "text",
    "full/note.txt": "mine", "rows.jsonl": '{"prompt": "x"}\n',
    "answers.jsonl": '{"model": "m", "said": "3", "answer": "4", "right": 0}\n',
    "summaries.jsonl": "".join(f'{{"document": "Text {n}", "summary": "T"}}\n' for n in range(100)),
    "log/metrics.jsonl": '{"step": 1, "loss": 2.0}\n',
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models, data sets of all kinds, and files that are wrong for most uses."""
    folder = tmp_path_factory.mktemp("world")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (folder / "latin.py").write_bytes(b"run_name = 'gr\xf6\xdfe'\n")
    (folder / "file.txt").write_text((ROOT / "configurator.py").read_text() * 3)
    text = prepare(PrepareConfig(source=str(folder / "file.txt"), out=str(folder / "data/text"),
                                 vocab_size=400, val_fraction=0.2, num_proc=1))
    base = Tokenizer.load(text.folder)
    for name, tokenizer in (("base", base), ("model", with_chat_tokens(base))):
        busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256)).save_pretrained(
            folder / name, eos_token_id=tokenizer.end_ids)
        tokenizer.save(folder / name)
    for name, kind in (("chats", "chat"), ("pairs", "preference")):
        prepare(PrepareConfig(source="problems", kind=kind, out=str(folder / "data" / name), num_proc=1,
                              tokenizer=str(folder / "model"), max_tokens=20_000))
    before = contents(folder)
    yield folder
    assert before.items() <= contents(folder).items(), "a command line changed or deleted a file"


def contents(folder):
    """{file: (size, time of its last change)} of the models and data sets."""
    # A refused run may leave its lock file.
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for name in ("base", "model", "data", "full") for path in (folder / name).rglob("*")
            if path.is_file() and path.name != ".lock"}


class Started(BaseException):
    """Raised where a program that takes long would start."""


STARTS = ("loop.backward", "subprocess.run", "tools.finetune_seq2seq.make_trainer", "uvicorn.Server.run")
# The answers of the verifier's start model.
JUDGED = [{"prompt": [{"content": "?"}], "row": {"key": f"{number}", "family": "add"},
           "answers": [{"ids": [1, 2, 3], "sampled": [0, 0, 1], "right": right} for right in (False, True)]}
          for number in range(64)]


def run(program, argv, folder, monkeypatch):
    """Run a program as from the command line, in a folder; returns its exit code."""
    def train(*args, **options):
        raise Started

    monkeypatch.chdir(folder)
    monkeypatch.setattr("loop.TrainState.__init__", SET_UP)  # checks lr_multipliers; the next line trains
    for name in STARTS:
        monkeypatch.setattr(name, train)
    monkeypatch.setattr("verifier.stored_answers", lambda *args: JUDGED)
    for module in ("formats.model_card", "training.run"):
        monkeypatch.setattr(f"{module}.commit", lambda: "")  # would start git
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *argv])
    with pytest.raises(SystemExit) as leaving:
        run_script(importlib.import_module(program).main)
    return leaving.value.code


def test_there_are_many():
    assert len(set(LINES)) == len(LINES) >= 300 and len(KINDS) >= 40
    assert {program for _, program, _ in LINES} == VALID.keys() == {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")] if "run_script(main)" in path.read_text()}


@pytest.mark.parametrize("program", VALID)
def test_help_is_printed(program, tmp_path, monkeypatch, capsys):
    assert run(program, ["--help"], tmp_path, monkeypatch) == 0
    assert "keys (--key=value" in capsys.readouterr().out


@pytest.mark.parametrize("kind, program, argument", LINES)
def test_a_wrong_command_line_is_a_message(kind, program, argument, world, monkeypatch, capsys):
    wrong = argument.split(" + ")
    assert run(program, [*shlex.split(VALID[program]), *wrong], world, monkeypatch) == 2
    message = capsys.readouterr().err
    lines = message.splitlines()
    assert 1 <= len(lines) <= 2 and "Traceback" not in message, message
    assert len(message) < 1000 or len(argument) > 1000, message
    assert lines[-1].startswith(f"{program}.py: "), message
    names = [part.removesuffix("/x") for each in wrong for part in each.lstrip("-").split("=", 1)]
    # stderr has no line breaks in a value, and "\\udcff" for a byte that is not UTF-8.
    names = [" ".join(name.encode(errors="backslashreplace").decode().split()) for name in names]
    assert any(name and name in message for name in [*names, "''", "out of memory"]), message


@pytest.mark.parametrize("program", VALID)
def test_without_the_wrong_argument_it_is_accepted(program, world, monkeypatch, capsys):
    """Otherwise the lines above would be refused for another reason."""
    try:
        assert run(program, shlex.split(VALID[program]), world, monkeypatch) == 0, capsys.readouterr().err
    except Started:
        assert program in f"{TRAINING} serve tools.ablate tools.finetune_seq2seq tools.get_smollm2 " \
                          "tools.search_layers tools.sweep tools.task_table".split()
