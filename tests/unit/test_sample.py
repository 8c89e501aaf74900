"""`sample`: seeds, parameters, chunks that survive kill -9, a real server over HTTP, and real vLLM where it is."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megafuse.cli.main import main
from megafuse.config.load import validate
from megafuse.config.sample import SampleConfig
from megafuse.data.chat import load_tokenizer
from megafuse.errors import ConfigError, DataError
from megafuse.sampling.client import ServerError
from megafuse.sampling.engines import Generated, Request, VllmEngine, prompt_tokens
from megafuse.sampling.registry import REGISTRY, SamplingParameters
from megafuse.sampling.sample import parameters_of, sample, seed_of
from megafuse.sampling.threads import in_threads
from megafuse.testing.chat_families import CHAT_FAMILIES
from megafuse.testing.server import ChatServer
from megafuse.testing.tokenizer import CHATML, make_tokenizer

PRESET = Path(__file__).parents[2] / "megafuse" / "config" / "presets" / "fusechat3.toml"


def write(path: Path, n: int = 5, domain: str = "math") -> Path:
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"question {i}", "domain": domain, "gold": str(i), "extra": {"kept": i}}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(prompts: Path, output: Path, **more: Any) -> SampleConfig:
    values = {"prompts": (prompts,), "output": output, "source": "me", "engine": "server", "chunk": 2}
    return validate(SampleConfig, {**values, **more})


class Echo:
    """An engine whose responses tell what was asked for."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        self.batches.append(len(requests))
        return [
            Generated(f"{r.messages[-1]['content']} {r.seed}", "length" if r.seed % 2 else "stop", 4) for r in requests
        ]


def test_the_papers_parameters(tmp_path: Path) -> None:
    """FuseChat-3.0's table; the recipe's names are those of the registry."""
    table = dict.fromkeys(("gemma-2-27b", "mistral-large-2407", "llama-3.1-70b"), (0.8, 0.95, 1.0))
    table |= dict.fromkeys(("qwen2.5-72b", "qwen2.5-math-72b"), (0.7, 0.8, 1.05))
    for name, want in table.items():
        found = parameters_of(config(tmp_path / "a", tmp_path / "b", source=name))
        assert (found.temperature, found.top_p, found.repetition_penalty) == want
    own = parameters_of(config(tmp_path / "a", tmp_path / "b", source="qwen2.5-72b", temperature=0.0))
    assert (own.temperature, own.top_p, own.repetition_penalty) == (0.0, 0.8, 1.05)
    assert '"qwen2.5-72b"' in PRESET.read_text() and '"qwen2.5-math-72b"' in PRESET.read_text()
    assert {"qwen2.5-72b", "qwen2.5-math-72b"} <= set(REGISTRY)


@pytest.mark.parametrize(("domain", "n"), [("instruction", 5), ("coding", 8), ("chinese", 1)])
def test_responses_and_seeds(tmp_path: Path, domain: str, n: int) -> None:
    prompts = write(tmp_path / "p.jsonl", 3, domain)
    result = sample(config(prompts, tmp_path / "out.jsonl"), engine=Echo())
    assert result.complete and result.counts["responses"] == 3 * n
    seeds = set()
    for row, given in zip(read(tmp_path / "out.jsonl"), read(prompts)):
        assert {k: v for k, v in row.items() if k != "responses"} == given
        for i, response in enumerate(row["responses"]):
            seed = seed_of(0, "me", row["prompt_id"], i)
            seeds.add(seed)
            assert response["text"] == f"{given['prompt']} {seed}" and 0 <= seed < 1 << 31
            assert response["finish_reason"] == ("length" if seed % 2 else "stop")
            assert (response["source"], response["model"]) == ("me", "me")
    assert len(seeds) == 3 * n


def test_system_messages_go_into_the_first_user_turn(tmp_path: Path) -> None:
    """What the source is asked; the output keeps the conversation as it was."""
    prompts = tmp_path / "p.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompts.write_text(json.dumps({"prompt_id": "p", "messages": messages}) + "\n")
    for name, want in (("template", "Why?"), ("first_user_turn", "Be brief.\n\nWhy?")):
        out = tmp_path / f"{name}.jsonl"
        sample(config(prompts, out, system_messages=name, n=1), engine=Echo())
        (row,) = read(out)
        assert row["responses"][0]["text"] == f"{want} {seed_of(0, 'me', 'p', 0)}" and row["messages"] == messages


def test_the_blank_of_the_template_is_taken_from_what_vllm_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One blank, where the template writes it before an answer, and none elsewhere."""

    class Llm:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def reset_prefix_cache(self) -> None: ...

        def generate(self, prompts: list[Any], *_: Any, **__: Any) -> list[Any]:
            texts = ["  It is 6.", "It is 6."]
            one = [SimpleNamespace(text=text, finish_reason="stop", token_ids=[1]) for text in texts]
            return [SimpleNamespace(outputs=[output]) for output, _ in zip(one, prompts)]

    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")  # so that the engine's own setting ends with the test
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm, SamplingParams=SimpleNamespace))
    asked = [Request("p", [{"role": "user", "content": "Why?"}], seed) for seed in (0, 1)]
    for name, want in (("mistral_0.3", " It is 6."), ("qwen_2.5", "  It is 6.")):
        folder = CHAT_FAMILIES[name].write(tmp_path / name)
        cpu = {"tensor_parallel": 1, "dtype": "float32", "gpu_memory": 0.9, "cpu_cache_gib": 1}
        engine = VllmEngine(folder, SamplingParameters(), max_tokens=8, max_model_len=512, **cpu)
        assert [generated.text for generated in engine.generate(asked)] == [want, "It is 6."]


def test_other_prompts_do_not_change_a_prompts_seeds(tmp_path: Path) -> None:
    sample(config(write(tmp_path / "a.jsonl", 5), tmp_path / "five.jsonl"), engine=Echo())
    sample(config(write(tmp_path / "b.jsonl", 2), tmp_path / "two.jsonl", chunk=1), engine=Echo())
    assert read(tmp_path / "five.jsonl")[:2] == read(tmp_path / "two.jsonl")


def test_jobs_and_resumption(tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", 7), tmp_path / "out.jsonl"
    sample(config(prompts, tmp_path / "whole.jsonl"), engine=Echo())
    first = sample(config(prompts, out, job=1, jobs=3), engine=Echo())
    assert first.made == 1 and not first.complete and not out.exists()
    rest = Echo()
    second = sample(config(prompts, out), engine=rest)
    assert second.made == 3 and second.complete and rest.batches == [10, 10, 5]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sample(config(prompts, out), engine=None).made == 0, "no engine is made for nothing"
    with pytest.raises(DataError, match="settings"):
        sample(config(prompts, out, temperature=0.5), engine=Echo())


def test_a_chunk_that_another_job_made_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", 6), tmp_path / "out.jsonl"

    class Slow(Echo):
        def generate(self, requests: Sequence[Request]) -> list[Generated]:
            if not self.batches:
                sample(config(prompts, out, job=1, jobs=3), engine=Echo())
            return super().generate(requests)

    slow = Slow()
    assert sample(config(prompts, out), engine=slow).made == len(slow.batches) == 2


def test_a_run_that_made_nothing_does_not_lock_the_output(tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", 3), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="not a folder"):
        sample(config(prompts, out, engine="vllm", model=tmp_path / "absent"))
    assert sample(config(prompts, out), engine=Echo()).complete
    with pytest.raises(DataError, match=r"settings\.max_tokens: 2048 then, 9 now"):
        sample(config(prompts, out, max_tokens=9), engine=Echo())


def reply(body: dict[str, Any]) -> dict[str, Any]:
    assert {"model", "messages", "temperature", "top_p", "max_tokens", "seed"} <= set(body)
    text = f"{body['messages'][-1]['content']}: {body['seed']}, {body['temperature']}, {body.get('repetition_penalty')}"
    return {"message": {"content": text}, "finish_reason": "length"}


def test_a_server_over_http_and_kill_9(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", 16)

    def slow(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.05)
        return reply(body)

    with ChatServer(slow, failures=3) as server:
        flags = ["--prompts", str(prompts), "--source", "qwen2.5-72b", "--engine", "server", "--n", "3", "--chunk", "2"]
        flags += ["--base_url", server.url, "--concurrency", "2"]
        assert main(["sample", *flags, "--output", str(tmp_path / "whole.jsonl")]) == 0
        out, chunks = tmp_path / "out.jsonl", tmp_path / "out.jsonl.chunks"
        command = [sys.executable, "-m", "megafuse", "sample", *flags, "--output", str(out)]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 120
        while len(list(chunks.glob("?????.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.random() / 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 2 <= len(list(chunks.glob("?????.jsonl"))) < 8 and not out.exists()
        assert main(["sample", *flags, "--output", str(out)]) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    seed = seed_of(0, "qwen2.5-72b", "p0", 2)
    assert read(out)[0]["responses"][2] == {
        "source": "qwen2.5-72b",
        "model": "qwen2.5-72b",
        "text": f"question 0: {seed}, 0.7, 1.05",
        "finish_reason": "length",
    }


def test_ctrl_c_does_not_wait_for_a_server(tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "p.jsonl", 4), tmp_path / "out.jsonl"
    asked, free = threading.Event(), threading.Event()

    def stuck(body: dict[str, Any]) -> str:
        if "question 2" in body["messages"][0]["content"]:
            asked.set()
            free.wait(120)
        return "fine"

    with ChatServer(stuck) as server:
        flags = ["--prompts", str(prompts), "--source", "me", "--engine", "server", "--n", "1", "--chunk", "2"]
        command = [sys.executable, "-m", "megafuse", "sample", *flags, "--base_url", server.url, "--output", str(out)]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        try:
            assert "Traceback" not in process.communicate(timeout=30)[1] and process.returncode == 130
        finally:
            process.kill()
            free.set()
        assert [p.name for p in (tmp_path / "out.jsonl.chunks").glob("?????.jsonl")] == ["00000.jsonl"]
        assert sample(config(prompts, out, n=1, base_url=server.url)).made == 1


def test_calls_in_threads() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def square(x: int) -> int:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(random.random() / 100)
        with lock:
            now -= 1
        return x * x

    assert in_threads(square, range(50), 4) == [x * x for x in range(50)] and most == 4
    assert in_threads(square, [], 4) == []
    begun: list[int] = []

    def fail(x: int) -> None:
        begun.append(x)
        if x == 3:
            raise ValueError(x)

    with pytest.raises(ValueError, match="3"):
        in_threads(fail, range(1000), 1)
    assert begun == [0, 1, 2, 3], "nothing is begun after a failure"


def test_a_server_that_refuses(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", 4)

    def picky(body: dict[str, Any]) -> Any:
        if "question 2" in body["messages"][0]["content"]:
            raise ValueError("context length exceeded")
        return "fine"

    with ChatServer(picky) as server:
        with pytest.raises(ServerError, match=r"HTTP 400.*context length exceeded"):
            sample(config(prompts, tmp_path / "out.jsonl", base_url=server.url, n=1))
        assert server.requests <= 4, "what cannot pass is not tried again"
    assert len(list((tmp_path / "out.jsonl.chunks").glob("?????.jsonl"))) == 1, "the first chunk is kept"
    with pytest.raises(ServerError, match="refused"):
        sample(config(prompts, tmp_path / "other.jsonl", base_url="http://127.0.0.1:9/v1", n=1, retries=0))


def test_half_of_an_emoji_from_a_server(tmp_path: Path) -> None:
    """JSON can say it and UTF-8 cannot: it must not stop the job, nor make a file that `score` refuses."""
    prompts = write(tmp_path / "p.jsonl", 2)
    with ChatServer(lambda body: "cut \ud83d") as server:
        sample(config(prompts, tmp_path / "out.jsonl", base_url=server.url, n=1), None)
    assert [row["responses"][0]["text"] for row in read(tmp_path / "out.jsonl")] == ["cut \ufffd"] * 2


def test_prompts_through_the_template(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "hi"}]
    plain = load_tokenizer(make_tokenizer(tmp_path / "a", 512))
    ids = prompt_tokens(plain, "p", user, 100)
    assert plain.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(DataError, match=rf"'p' has {len(ids)} tokens, max_model_len is {len(ids)}"):
        prompt_tokens(plain, "p", user, len(ids))
    bos = {"bos_token": "<|endoftext|>", "add_bos": True}
    once = load_tokenizer(make_tokenizer(tmp_path / "b", 512, chat_template="{{ bos_token }}" + CHATML, **bos))
    assert prompt_tokens(once, "p", user, 100)[:2] == [0, 1], (
        "one BOS, from the template, although the tokenizer adds one"
    )
    twice = load_tokenizer(
        make_tokenizer(tmp_path / "c", 512, chat_template="{{ bos_token }}{{ bos_token }}" + CHATML, **bos)
    )
    with pytest.raises(ConfigError, match="two BOS tokens"):
        prompt_tokens(twice, "p", user, 100)
    strict = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}" + CHATML
    refusing = load_tokenizer(make_tokenizer(tmp_path / "d", 512, chat_template=strict))
    with pytest.raises(
        DataError, match=r"'p': the chat template refuses this conversation: no system role.*first_user_turn"
    ):
        prompt_tokens(refusing, "p", [{"role": "system", "content": "x"}, *user], 100)


def test_bad_input(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", 2)
    bare = make_tokenizer(tmp_path / "bare", 512, chat_template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        sample(config(prompts, tmp_path / "a.jsonl", engine="vllm", model=bare))
    with pytest.raises(DataError, match="of the domains"):
        sample(config(prompts, tmp_path / "a.jsonl", domains=("coding",)), engine=Echo())
    with pytest.raises(DataError, match="earlier file"):
        twice = config(prompts, tmp_path / "a.jsonl").model_copy(update={"prompts": (prompts, prompts)})
        sample(twice, engine=Echo())
    with pytest.raises(ConfigError, match="needs model"):
        config(prompts, tmp_path / "a.jsonl", engine="vllm")


@pytest.mark.timeout(900)
def test_real_vllm_killed_and_started_again(tmp_path: Path) -> None:
    """SmolLM2 on the CPU, killed with -9 at a random moment of its work: the bytes of an uninterrupted run."""
    python, model = os.environ.get("MEGAFUSE_VLLM_PYTHON", ""), os.environ.get("MEGAFUSE_SMOLLM2", "")
    if not (python and model):
        why = "MEGAFUSE_VLLM_PYTHON (a Python with vLLM) and MEGAFUSE_SMOLLM2 (a model folder) are not set"
        pytest.skip(os.environ.get("MEGAFUSE_NO_VLLM", why))
    flags = ["--prompts", str(write(tmp_path / "p.jsonl", 12)), "--source", "smollm2", "--model", model, "--n", "2"]
    flags += ["--max_tokens", "12", "--max_model_len", "128", "--dtype", "float32", "--chunk", "1"]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [python, "-m", "megafuse", "sample", *flags, "--output", str(tmp_path / name)]
        with open(tmp_path / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def chunks(name: str) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (tmp_path / f"{name}.chunks").glob("?????.jsonl")}

    assert start("one.jsonl").wait() == 0, (tmp_path / "one.jsonl.log").read_text()[-3000:]
    process = start("two.jsonl")
    wanted = random.randrange(1, 6)
    while len(chunks("two.jsonl")) < wanted and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() / 5)
    process.kill()
    process.wait()
    left = chunks("two.jsonl")
    assert wanted <= len(left) < 12 and not (tmp_path / "two.jsonl").exists()
    assert start("two.jsonl").wait() == 0, (tmp_path / "two.jsonl.log").read_text()[-3000:]
    assert left.items() <= chunks("two.jsonl").items(), "what was finished was not made again"
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    texts = [r["text"] for row in read(tmp_path / "one.jsonl") for r in row["responses"]]
    assert len(set(texts)) > 12 and all(texts)
