"""Open questions, answered by two models and compared by a third: the pairs of MT-bench (arXiv 2306.05685).

    python eval.py --model=out/dpo --tasks=mt_bench --opponent=out/sft --judge=FOLDER --data=mt_bench=FILE
    OPENAI_API_KEY=.. python eval.py .. --judge=https://HOST/v1 --judge_model=NAME

    {"question_id": 81, "category": "writing", "turns": ["Write a post ..", "Rewrite it .."],
     "reference": ["..", ".."]}                              or {"prompt": ".."}; the reference is optional

Both models answer all turns of a conversation greedily. The judge reads both conversations twice, in both
orders, and says [[A]], [[B]] or, for a tie, [[C]]. A model wins if both verdicts name it; everything else is
a tie. That is the paper's protocol; the prompt is our own. The figures are those of --model:

    score             1 for a win, 1/2 for a tie, 0 for a loss
    win, tie, loss    their shares
    self_agreement    the share of pairs where both orders have the same winner, or both a tie
    unread            the share of verdicts that could not be read, if there are any; they count as ties

--judge is a model folder, which says what is most likely after the prompt, or the address of an API like
OpenAI's. Questions and answers are sent there, with the key in OPENAI_API_KEY. Judges prefer long answers,
their own and, often, the first or the second one: the details have the share of verdicts for the first.
Files: mt_bench*, such as question.jsonl of github.com/lm-sys/FastChat; hub: HuggingFaceH4/mt_bench_prompts.
"""

import http.client
import json
import os
import re
import urllib.request
from typing import Any, NamedTuple

from configurator import UserError
from evals.benchmarks import answer_text, convert, read, texts_of
from evals.lm import LM
from evals.results import Result, mean, means
from formats.chat_format import end_of_turn, require_chat
from generation.assistant import Message

HUB = "HuggingFaceH4/mt_bench_prompts::train"
MAX_NEW_TOKENS = 512  # of an answer, and of what an API says
TIMEOUT = 120.0  # seconds per request
VERDICTS = ("[[A]]", "[[B]]", "[[C]]")
ASK = ("Two assistants have answered the same user. Which answers are better: more correct, more helpful, "
       "and closer to what the user wants? Neither length nor order counts.\n\n{reference}"
       "### Assistant A\n{a}\n\n### Assistant B\n{b}\n\n"
       "Reply with [[A]] if A is better, [[B]] if B is better, or [[C]] if they are equally good.")


class ChatTask(NamedTuple):
    turns: list[str]  # what the user says
    reference: list[str]  # right answers, or nothing


def task_of(row: dict[str, Any]) -> ChatTask:
    turns = row["turns"] if "turns" in row else row["prompt"]
    turns = [answer_text(turns)] if isinstance(turns, str) else texts_of(turns)
    if not turns:
        raise ValueError("no question")
    return ChatTask(turns, texts_of(row.get("reference") or []))


def load(source: str | None, limit: int, shots: int | None, judge: str = "", judge_model: str = "",
         opponent: str = "") -> list[ChatTask]:
    """The first `limit` questions. UserError without a judge or an opponent. There are no worked examples."""
    if not judge or not opponent:
        raise UserError("mt_bench: needs --judge=, a model folder or the address of an API, and --opponent=, "
                        "the model to compare with")
    return convert(read(source, "mt_bench", HUB)[:limit], task_of)


# ---- Conversations and verdicts ---------------------------------------------------------------------------

def transcripts(lm: LM, tasks: list[ChatTask]) -> list[str]:
    """The whole conversation about each task as text. UserError for a model without chat tokens."""
    require_chat(lm.tokenizer, str(lm.folder))
    talks: list[list[Message]] = [[] for _ in tasks]
    for turn in range(max(len(task.turns) for task in tasks)):
        left = [number for number, task in enumerate(tasks) if turn < len(task.turns)]
        for number in left:
            talks[number].append({"role": "user", "content": tasks[number].turns[turn]})
        for number, [reply] in zip(left, lm.reply([talks[number] for number in left], MAX_NEW_TOKENS,
                                                  most_calls=0), strict=True):
            talks[number].append({"role": "assistant", "content": reply["content"]})
    return ["\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in talk)
            for talk in talks]


def from_api(url: str, model: str, prompt: str) -> str:
    """What a model with an API like OpenAI's says. UserError if there is no answer."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), {
            "Content-Type": "application/json", "User-Agent": "nanollama"})
        # Only this address may get the key. urllib sends all other headers on if the server redirects.
        request.add_unredirected_header("Authorization", f"Bearer {os.environ.get('OPENAI_API_KEY', '')}")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)["choices"][0]["message"]["content"] or ""
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"judge={url}: {type(error).__name__}: {error}") from None


def like(lm: LM, path: str) -> LM:
    """Another model on the device and in the dtype of `lm`."""
    weight = lm.model.head_weight
    return LM(path, str(weight.device), str(weight.dtype).removeprefix("torch."), batch_size=lm.batch_size)


def judge_all(judge: str, model: str, prompts: list[str], asker: LM) -> list[str]:
    """The verdict on each prompt: "A", "B", "C", or "" if it cannot be read. asker: has device and dtype."""
    if judge.startswith(("http://", "https://")):
        said = [re.findall(r"\[\[([ABC])\]\]", from_api(judge, model, prompt)) for prompt in prompts]
        return [letters[-1] if letters else "" for letters in said]
    lm = like(asker, judge)
    lm.chat = end_of_turn(lm.tokenizer) is not None  # a base model reads the prompt as plain text
    found = lm.loglikelihood([(prompt, f" {verdict}") for prompt in prompts for verdict in VERDICTS])
    rows = [found[at:at + len(VERDICTS)] for at in range(0, len(found), len(VERDICTS))]
    if cut := sum(row[0].truncated > 0 for row in rows):
        raise UserError(f"judge={judge}: its context of {lm.model.config.block_size} tokens is too short for "
                        f"{cut} of {len(prompts)} comparisons")
    return [max(zip(row, "ABC", strict=True), key=lambda pair: pair[0].log_prob)[1] for row in rows]


def compare(first: str, second: str) -> dict[str, Any]:
    """The outcome of a pair. first: the verdict with the model as A; second: the one with the model as B."""
    winners = [{"A": 1, "B": -1}.get(first, 0), {"A": -1, "B": 1}.get(second, 0)]  # 1: the model
    win, loss = winners == [1, 1], winners == [-1, -1]
    return {"verdicts": [first, second], "score": (win - loss + 1) / 2, "win": win,
            "tie": not win and not loss, "loss": loss,
            "self_agreement": winners[0] == winners[1] and "" not in (first, second)}


def score(lm: LM, tasks: list[ChatTask], judge: str, judge_model: str, opponent: str) -> Result:
    """The figures of the module's docstring. The opponent and the judge are loaded one after the other."""
    ours, theirs = transcripts(lm, tasks), transcripts(like(lm, opponent), tasks)
    prompts = [ASK.format(a=a, b=b, reference="".join(
        f"### A right answer\n{reference}\n\n" for reference in task.reference))
        for one, two in ((ours, theirs), (theirs, ours)) for task, a, b in zip(tasks, one, two, strict=True)]
    verdicts = judge_all(judge, judge_model, prompts, lm)
    pairs = [compare(*pair) for pair in zip(verdicts[:len(tasks)], verdicts[len(tasks):], strict=True)]
    answers = [{"question": task.turns, "said": one, "opponent": two, **pair}
               for task, one, two, pair in zip(tasks, ours, theirs, pairs, strict=True)]
    figures = means(answers, ("score", "win", "tie", "loss", "self_agreement"))
    if "" in verdicts:
        figures["unread"] = mean([verdict == "" for verdict in verdicts])
    return Result(figures, answers, {"judge": judge_model or judge, "opponent": opponent,
                                     "first_preferred": mean([each == "A" for each in verdicts])._asdict()})
