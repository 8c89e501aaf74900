"""Model folders from the internet: what is in them is read, never run."""

import json
from pathlib import Path

import pytest

from megafuse.converters.hf_config import read_hf_config
from megafuse.converters.importer import import_hf
from megafuse.data.tokenise import ChatTokenizer
from megafuse.errors import ConfigError, UnsupportedModelError
from megafuse.testing.tiny import write_tiny_llama
from megafuse.testing.tokenizer import make_tokenizer

pytestmark = pytest.mark.faults

AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    folder, canary = write_tiny_llama(tmp_path / "hf", seed=1, layers=1), tmp_path / "canary"
    plain = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    (folder / "config.json").write_text(json.dumps({**plain, "auto_map": AUTO_MAP}))
    import_hf(folder, tmp_path / "model")
    import_hf(tmp_path / "hf", tmp_path / "again")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("_attn_implementation_internal", "evil/kernel"), ("_attn_implementation", "evil/kernel"),
     ("trust_remote_code", True), ("use_kernels", True)],
)  # fmt: skip
def test_a_configuration_that_asks_for_foreign_code_is_refused(tmp_path: Path, key: str, value: object) -> None:
    folder = write_tiny_llama(tmp_path / "hf", seed=1, layers=1)
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, key: value}))
    with pytest.raises(UnsupportedModelError, match=key):
        read_hf_config(folder)


@pytest.mark.parametrize(
    "attack",
    [
        "cycler.__init__.__globals__.os.system('touch CANARY')",
        "lipsum.__globals__['os'].system('touch CANARY')",
        "''.__class__.__mro__[1].__subclasses__()[0]('CANARY', 'w')",
        "messages.__class__.__init__.__globals__['__builtins__']['open']('CANARY', 'w')",
        "raise_exception.__globals__['__builtins__']['open']('CANARY', 'w')",
        "self._TemplateReference__context['range'].__class__.__base__.__subclasses__()",
    ],
)
def test_a_chat_template_reaches_nothing_outside(tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{{ " + attack + " }}"
    make_tokenizer(tmp_path / "tokenizer", 300, chat_template=template.replace("CANARY", str(canary)))
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(ConfigError, match="the chat template fails"):
        ChatTokenizer(tmp_path / "tokenizer")
    assert not canary.exists()
