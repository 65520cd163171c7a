"""serve.py and other programs: a TypeScript client, lm-evaluation-harness, transformers and llama.cpp.

The TypeScript client needs node and its packages: npm install --no-save openai typescript @types/node
"""

# ruff: noqa: F401, F811 (fixtures of other tests)

import json
import random
import shutil
import subprocess

import pytest
import torch

import export
import sample
from bench import harness, llama_cpp
from dataset.problems import problem_rows
from evals.lm import LM
from evals.multiple_choice import ask, log_probs_of
from evals.tasks import choice
from formats import hf
from formats.chat_format import encode_prompt, read_answer, with_chat_tokens
from formats.tokenizer import Tokenizer
from generation.batcher import Batcher
from tests.conftest import ROOT, busy_model, tiny_config
from tests.formats.test_chat_template import all_formats, formats
from tests.test_serve import CALL, QUESTION, TOOL, chat_folder, script, server, start

NODE_MODULES = ROOT / "node_modules"


@pytest.mark.skipif(shutil.which("node") is None or not (NODE_MODULES / "openai").exists(),
                    reason="npm install --no-save openai typescript @types/node")
def test_a_typescript_client(server, script, tmp_path):
    pytest.importorskip("llguidance")
    script |= {"12 * 30?": {"tool_calls": [CALL]}, "360": {"thought": "so", "content": "It is 360."}}
    shutil.copy(ROOT / "tests" / "client.mts", tmp_path)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    compiler = [NODE_MODULES / ".bin" / "tsc", "--strict", "--skipLibCheck", "--target", "es2022", "--module",
                "nodenext", "--types", "node", "client.mts"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    done = subprocess.run(["node", "client.mjs", f"{server.url}/v1"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    assert done.stdout.splitlines() == ["tool_calls 12 * 30", "It is 360. true", "boolean", "true"], done


def test_lm_eval_prefers_the_choices_that_eval_prefers(start, chat_folder, tmp_path, monkeypatch):
    """100 questions of lm_eval's arc_easy through the API, and of ours from the folder."""
    package = pytest.importorskip("lm_eval")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    draw, words = random.Random(0), "parser file bytes returns 12 naïve é read users (x) None".split()
    text = lambda most: " ".join(draw.choices(words, k=draw.randint(1, most)))  # noqa: E731
    rows = [{"query": f"Question: {text(9)}", "choices": [text(4) for _ in "ABCD"],
             "gold": draw.randrange(4)} for _ in range(125)]
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = harness.write_tasks(tmp_path / "rows", str(tmp_path), ["arc_easy"], 100, shots=0)
    server = start(f"--model={chat_folder}", "--slots=8")
    lm = completions.LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model=str(chat_folder),
                                         tokenizer=str(chat_folder), batch_size=8, max_length=256)
    manager = package.tasks.TaskManager(include_path=str(tmp_path / "rows" / "harness"),
                                        include_defaults=False)
    found = package.simple_evaluate(lm, tasks=tasks["arc_easy"], task_manager=manager, bootstrap_iters=0)
    theirs = [[score for score, _ in each["filtered_resps"]] for each in found["samples"]["our_arc_easy"]]
    questions = choice.load(str(tmp_path / "rows"), 100, 0, name="arc_easy")
    ours = log_probs_of(ask(LM(str(chat_folder), "cpu"), questions))
    assert len(ours) == 100
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
        assert max(range(4), key=one.__getitem__) == max(range(4), key=other.__getitem__)


@pytest.mark.skipif(not llama_cpp.has_server(), reason="xllamacpp is not installed")
def test_greedy_answers_of_five_programs(start, tmp_path, capsys):
    """sample.py, serve.py on the folder and on its GGUF file, transformers, and llama.cpp."""
    import transformers
    texts = [row["text"] for row in problem_rows("text", 500, seed=0)]
    tokenizer, folder = with_chat_tokens(Tokenizer.train(texts, 400)), tmp_path / "model"
    folder.mkdir()
    # With an output table of its own, a random model does not only repeat a token.
    config = tiny_config(vocab_size=tokenizer.vocab_size, block_size=256, tie_embeddings=False)
    busy_model(config, seed=2).save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)
    export.main([f"--model={folder}", "--format=gguf", "--quantize=f32", f"--out={tmp_path / 'gguf'}"])
    file = hf.gguf_of(tmp_path / "gguf")
    conversations = [[{"role": "user", "content": text}] for text in ("Why?", "What is it?", "caf\u00e9")]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations))
    capsys.readouterr()
    sample.main([f"--model={folder}", f"--prompt_file={questions}", "--temperature=0", "--max_new_tokens=24",
                 "--device=cpu"])
    ours = [json.loads(line)["replies"][0] for line in capsys.readouterr().out.splitlines()]

    def served(model):
        server = start(f"--model={model}", "--slots=2")
        for each in conversations:
            body = {"messages": each, "temperature": 0, "max_tokens": 24}
            yield server.ask("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]

    def generated():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for each in conversations:
            ids = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
                each, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            yield model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:].tolist()

    with llama_cpp.Server(file, 256, exact=True) as other:
        written = other.write([encode_prompt(tokenizer, each) for each in conversations], 24)
    theirs = list(generated())
    assert theirs == written and len({token for ids in written for token in ids}) > 10
    texts = [read_answer(tokenizer, ids)["content"] for ids in theirs]
    assert texts == [message["content"] for message in ours] == list(served(folder)) == list(served(file))


def test_a_model_in_its_own_chat_format(start, formats, tmp_path, monkeypatch):
    """Qwen3: the prompt is that of transformers, with the tools, and its call becomes one of OpenAI's API."""
    ours, theirs = formats("qwen3")
    busy_model(tiny_config(vocab_size=ours.vocab_size, block_size=1024)).save_pretrained(
        tmp_path, eos_token_id=ours.end_ids)
    ours.save(tmp_path)
    call = '{"name": "calculator", "arguments": {"expression": "1"}}'
    text = f"<think>\nso\n</think>\n\n<tool_call>\n{call}\n</tool_call><|im_end|>"
    ids, prompts = theirs(text, add_special_tokens=False).input_ids, []

    def choose(self, row, logits):
        prompts.append(row.prompt)
        return ids[len(row.new)]

    monkeypatch.setattr(Batcher, "choose", choose)
    server = start(f"--model={tmp_path}", "--slots=1")
    body = {"messages": QUESTION, "tools": [TOOL], "max_tokens": 200}
    status, answer = server.ask("/v1/chat/completions", body)
    assert status == 200, answer
    asked = theirs.apply_chat_template(QUESTION, tools=[TOOL], add_generation_prompt=True)["input_ids"]
    assert prompts[0] == asked
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "so" and message["content"] == ""
    assert message["tool_calls"][0]["function"] == {"name": "calculator", "arguments": '{"expression": "1"}'}
