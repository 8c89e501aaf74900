"""The prompt sets of FuseRL and FuseChat-3.0, each as a declaration: columns, domain, filter, gold answer or tests.

Column names are those of the sets on the hub. What the papers leave open is ours and said where it stands: code and
math are recognised by the set's own categories where it has them, by words where it has not; test cases are taken from
the examples of a LeetCode problem, and from the assertions that an instruction of self-oss-instruct states.
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
Language = Literal["en", "zh"]


@dataclass(frozen=True)
class PromptRecipe:
    """How rows of one published set become prompts."""

    hub: str
    domain: str
    text: Callable[[Row], Any]
    columns: tuple[str, ...]  # that must be there
    language: Language = "en"
    keep: Callable[[Row, str], bool] = lambda row, text: True
    why_not: str = "filtered"  # name of the count of rows that `keep` refuses
    gold: Callable[[Row], Any] | None = None
    tests: Callable[[Row], dict[str, Any] | None] | None = None
    given: tuple[str, Callable[[Row], Any]] | None = None  # (source, response) that the set brings along


_CODE = re.compile(
    r"```|\b(?:python|javascript|java|c\+\+|sql|html|css|php|ruby|golang|rust|typescript|regex|bash|json|xml|api)\b|"
    r"\b(?:function|algorithm|program|script|code|coding|compile|debug|database query)s?\b|"
    "\u4ee3\u7801|\u7f16\u7a0b|\u7a0b\u5e8f|\u51fd\u6570|\u7b97\u6cd5",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\\frac|\\sqrt|\$[^$]+=[^$]+\$|\b(?:solve for|equation|integral|derivative|theorem|polynomial|calculate|"
    r"probability|arithmetic|geometry|algebra|how many|how much)\b|\d\s*[-+*/=^]\s*\d|"
    "\u65b9\u7a0b|\u8ba1\u7b97|\u6c42\u89e3|\u6570\u5b66|\u6982\u7387",
    re.IGNORECASE,
)


def general_text(row: Row, text: str) -> bool:
    """Neither code nor math, by words."""
    return not _CODE.search(text) and not _MATH.search(text)


def general_category(row: Row, text: str) -> bool:
    """Neither code nor math, by Magpie's `task_category`."""
    category = str(row.get("task_category")).casefold()  # releases differ in their capitals
    return category not in ("math", "coding & debugging", "data analysis")


def _joined(row: Row) -> str:
    return f"{row['instruction']}\n{row['input']}" if row.get("input") else str(row["instruction"])


def leetcode_text(row: Row) -> str:
    """The problem, and the signature that its tests call."""
    signature = _signature(row)
    return f"{row['content']}\n\nWrite a Python function `{signature}`." if signature else str(row["content"])


_DEFINITION = re.compile(r"^ *def +(\w+)\(([^)]*)\)", re.MULTILINE)


def _signature(row: Row) -> str | None:
    """`name(parameters)` of the function of the set's Python solution that takes what the examples give.

    Solutions have helpers, and some of them answer another problem: a function counts only where it can be called with
    the arguments of the first example; the one with those parameter names is preferred, then the one named like the
    problem's slug.
    """
    examples = _examples(row)
    if not examples:
        return None
    names, values, _ = examples[0]
    slug = re.sub(r"\W|_", "", str(row.get("slug") or "")).lower()
    best: tuple[bool, bool, str] | None = None
    for name, given in _DEFINITION.findall(str(row.get("python") or "")):
        parts = [part.strip() for part in given.split(",") if part.strip() and part.strip() != "self"]
        parameters = [part.split(":")[0].split("=")[0].strip() for part in parts]
        needed = sum("=" not in part for part in parts)
        if name.startswith("__") or not needed <= len(values) <= len(parameters):
            continue
        parameters = parameters[: len(values)]
        rank = (parameters == names, name.replace("_", "").lower() == slug, f"{name}({', '.join(parameters)})")
        if best is None or rank[:2] > best[:2]:
            best = rank
    return best[2] if best else None


_EXAMPLE = re.compile(r"\*{0,2}Input:?\*{0,2}:?\s*(.+?)\s*\n+\s*\*{0,2}Output:?\*{0,2}:?\s*(.+?)\s*(?:\n|$)")
_WORDS = {"true": "True", "false": "False", "null": "None"}


def _examples(row: Row) -> list[tuple[list[str], list[Any], Any]]:
    """(names, values, result) of each example whose input is written `name = value, ...`.

    The set's text is Markdown made from a page: brackets are escaped, and a space stands before a closing quote.
    """
    found = []
    for given, wanted in _EXAMPLE.findall(re.sub(r"\\([^\w\s])", r"\1", str(row["content"]))):
        try:
            call, result = (_expression(text) for text in (f"f({given})", wanted))
            assert isinstance(call, ast.Call)
            names = [k.arg or "" for k in call.keywords]
            values = [ast.literal_eval(value) for value in [*call.args, *(k.value for k in call.keywords)]]
            found.append((names, values, ast.literal_eval(result)))
        except (SyntaxError, ValueError):
            continue
    return found


def _expression(text: str) -> ast.expr:
    text = re.sub(r' "(?=[\],)]|$)', '"', text)
    return ast.parse(re.sub(r"\b(true|false|null)\b", lambda m: _WORDS[m[1]], text), mode="eval").body


def leetcode_tests(row: Row) -> dict[str, Any] | None:
    """Tests from the examples of a problem; None where none can be read, or no function of the solution fits them."""
    signature = _signature(row)
    if signature is None:
        return None
    lines = [
        f"    assert candidate({', '.join(map(repr, values))}) == {result!r}" for _, values, result in _examples(row)
    ]
    return {"code": "def check(candidate):\n" + "\n".join(lines) + "\n", "entry_point": signature.split("(")[0]}


_STATED = re.compile(
    r"your code should pass the following [^\n`]*\n+```(?:python|py)?\n(.*?)```", re.DOTALL | re.IGNORECASE
)
_BLOCK = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


def assertion_tests(row: Row) -> dict[str, Any] | None:
    """Tests of a self-oss-instruct row: the block that the instruction says the code should pass, with what it sets up;
    where it states none, the assertions at top level of the response's code. None where there are none of both.
    """
    for block in _STATED.findall(str(row["instruction"])):
        tree = _parsed(block)
        if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            return {"code": block}
    nodes = [node for block in _BLOCK.findall(str(row["response"])) for node in _parsed(block).body]
    found = [ast.unparse(node) for node in nodes if isinstance(node, ast.Assert)]
    return {"code": "\n".join(found) + "\n"} if found else None


def _parsed(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


RECIPES: dict[str, PromptRecipe] = {
    "ultrafeedback": PromptRecipe(
        "openbmb/UltraFeedback", "instruction", lambda r: r["instruction"], ("instruction",), keep=general_text,
        why_not="code_or_math",
    ),
    "magpie_pro_dpo": PromptRecipe(
        "Magpie-Align/Magpie-Pro-DPO-100K-v0.1", "instruction", lambda r: r["instruction"],
        ("instruction", "task_category"), keep=general_category, why_not="code_or_math",
    ),
    "helpsteer2": PromptRecipe(
        "nvidia/HelpSteer2", "instruction", lambda r: r["prompt"], ("prompt",), keep=general_text,
        why_not="code_or_math",
    ),
    "openmathinstruct2": PromptRecipe(
        "nvidia/OpenMathInstruct-2", "math", lambda r: r["problem"],
        ("problem", "expected_answer", "generated_solution"),
        gold=lambda r: r["expected_answer"], given=("llama-3.1-405b", lambda r: r["generated_solution"]),
    ),
    "leetcode": PromptRecipe(
        "greengerong/leetcode", "coding", leetcode_text, ("content", "python"), tests=leetcode_tests,
    ),
    "self_oss_instruct": PromptRecipe(
        "bigcode/self-oss-instruct-sc2-exec-filter-50k", "coding", lambda r: r["instruction"],
        ("instruction", "response"), tests=assertion_tests,
    ),
    "alpaca_gpt4_zh": PromptRecipe(
        "llamafactory/alpaca_gpt4_zh", "chinese", _joined, ("instruction", "input"), "zh", keep=general_text,
        why_not="code_or_math",
    ),
    "magpie_qwen2_pro_zh": PromptRecipe(
        "Magpie-Align/Magpie-Qwen2-Pro-200K-Chinese", "chinese", lambda r: r["instruction"],
        ("instruction", "task_category"), "zh", keep=general_category, why_not="code_or_math",
    ),
}  # fmt: skip
