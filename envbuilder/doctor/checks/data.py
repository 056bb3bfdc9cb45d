"""A training config's data: faulty lines, lengths, and how many tokens are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.inspected import LIMIT_S, MARK, NEEDS, Parts, reads
from envbuilder.doctor.subject import Subject

SMALL_SHARE = 0.001
"""Of trained tokens: nearly all of the work would be for nothing."""
MANY_CUT = 0.05
"""Share of the examples that are cut or left out: above it, the data and seq_length don't suit each other."""
_NAMES = ("data", "validation_data")
_NO_FILE = "The config makes random tokens: there is no data file."
_NO_TOKENS = "There is no tokenizer to count with: see model.tokenizer."


@reads("data", without=_NO_FILE, files=True)
def check_lines(subject: Subject, parts: Parts) -> Outcome:
    """Every line of both data files: encoding, JSON, roles, turns."""
    evidence: list[str] = []
    faulty: list[dict[str, Any]] = []
    for data in _files(parts):
        if why := _unusable(data):
            return failed(f"{data['file']} {why[0]}.", remedy=why[1])
        mark = f", starts with a {data['byte_order_mark']} mark" if data["byte_order_mark"] else ""
        part = "" if data["complete"] else " (then the time was up)"
        evidence.append(
            f"{data['file']}: {data['lines']:,} lines looked at{part}, {data['problems']} wrong{mark}"
        )
        evidence += data["first_problems"]
        faulty += [data] if data["problems"] else []
    if faulty:
        first = faulty[0]
        number = first["first_problems"][0].partition(":")[0].removeprefix("line ")
        count = sum(data["problems"] for data in faulty)
        return failed(
            f"{'1 line of data is' if count == 1 else f'{count:,} lines of data are'} no conversation that "
            "can be trained on.",
            *evidence,
            remedy=_recode(first) or f"sed -n {number}p {first['file']}",
        )
    return ok("Every line that was looked at is a conversation with an assistant's turn.", *evidence)


def _files(parts: Parts) -> list[dict[str, Any]]:
    return [parts[name] for name in _NAMES if name in parts]


def _unusable(data: dict[str, Any]) -> tuple[str, str] | None:
    """Why no line can be looked at, and the remedy."""
    if reason := data.get("unreadable"):
        return f"can't be read: {reason}", f"ls -l {data['file']}"
    if data["byte_order_mark"] == "UTF-16":
        return "is UTF-16; the trainer reads UTF-8", _iconv(data["file"], "UTF-16")
    if data["lines"] == 0:
        return "has no lines", f"wc {data['file']}  # bring the data once more"
    return None


def _recode(data: dict[str, Any]) -> str | None:
    """How to make UTF-8 of a file that looks like another encoding."""
    if any("codec can't decode" in problem for problem in data["first_problems"]):
        return (
            f"file {data['file']}  # tells the encoding, say ISO-8859-1; {_iconv(data['file'], 'ISO-8859-1')}"
        )
    return None


def _iconv(file: str, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {file} > {file}.utf8 && mv {file}.utf8 {file}"


@reads("validation_data", without="The config has no validation file.", files=True)
def check_overlap(subject: Subject, parts: Parts) -> Outcome:
    """Conversations that are in both files: the validation loss would tell what was learnt by heart."""
    if "data" not in parts or any(data.get("unreadable") for data in _files(parts)):
        return skipped("There are no two files to compare: see data.lines.")
    data, validation = parts["data"], parts["validation_data"]
    if data["shared"]:
        return warning(
            f"{data['shared']:,} training conversations are in the validation file too: its loss flatters.",
            data["file"],
            validation["file"],
            *data["first_shared"],
            remedy=f"Take them out of one: grep -vxFf {validation['file']} {data['file']} > NEW  "
            "# leaves out equal lines",
        )
    return ok("No training conversation is in the validation file.", data["file"], validation["file"])


@reads("tokens", without=_NO_TOKENS)
def check_tokens(subject: Subject, parts: Parts) -> Outcome:
    """Examples, tokens, the share that is trained, and what seq_length cuts off."""
    counted = [tokens for name in _NAMES if (tokens := parts["tokens"].get(name))]
    if not counted or not counted[0]["sampled"]:
        return skipped("There are no conversations to count: see data.lines.")
    evidence = [line for tokens in counted for line in _described(tokens)]
    for name, tokens in zip(("training", "validation"), counted):
        if fault := _token_fault(f"{name} data", tokens):
            verdict, summary, remedy = fault
            return verdict(summary, *evidence, remedy=remedy)
    data = counted[0]
    share = f"{data['trained'] / data['tokens']:.1%} of {data['tokens']:,} tokens are trained"
    return ok(f"{share}, in {data['examples']:,} examples{_sampled(data)}.", *evidence)


def _described(tokens: dict[str, Any]) -> list[str]:
    trained = f"{tokens['trained']:,} of {tokens['tokens']:,} tokens trained{_sampled(tokens)}"
    if tokens.get("synthetic"):
        return [f"{tokens['examples']:,} examples of random tokens: {trained}"]
    lines = [
        f"{tokens['examples']:,} examples: {trained}",
        f"tokens of an example: half up to {tokens['p50']:,}, 95 % up to {tokens['p95']:,}, "
        f"longest {tokens['longest']:,}; seq_length {tokens['seq_length']:,}",
    ]
    for what, name in (
        ("cut to seq_length", "truncated"),
        ("left out (too long, or nothing trained within seq_length)", "dropped"),
        ("refused by the chat template", "refused"),
    ):
        if tokens[name]:
            lines.append(f"{tokens[name]:,} {what}: " + "; ".join(map(str, tokens[f"{name}_lines"])))
    return lines


def _sampled(tokens: dict[str, Any]) -> str:
    if tokens["sampled"] == tokens["lines"]:
        return ""
    return f", from a sample of {tokens['sampled']:,} of {tokens['lines']:,} lines"


def _token_fault(name: str, tokens: dict[str, Any]) -> tuple[Callable[..., Outcome], str, str] | None:
    """The verdict, the summary and the remedy, where something is wrong."""
    if tokens.get("synthetic"):
        return None
    longer = f"--set dataset.seq_length={tokens['longest']}"
    if tokens["refused"]:
        return (
            failed,
            f"The chat template can't render {tokens['refused']:,} conversations of the {name}.",
            f"{MARK}, or change those lines",
        )
    if not tokens["trained"] or tokens["trained"] < SMALL_SHARE * tokens["tokens"]:
        return (
            failed,
            f"Of the {name}, {tokens['trained']:,} of {tokens['tokens']:,} tokens would be trained, and "
            f"{tokens['dropped']:,} of {tokens['sampled']:,} examples are left out{_sampled(tokens)}.",
            longer if tokens["longest"] > tokens["seq_length"] else MARK,
        )
    lost = tokens["truncated"] + tokens["dropped"]
    if lost > MANY_CUT * tokens["sampled"]:
        return (
            warning,
            f"seq_length {tokens['seq_length']:,} cuts or leaves out {lost:,} of {tokens['sampled']:,} "
            f"examples of the {name}{_sampled(tokens)}.",
            f"{longer}  # takes more memory: see model.memory",
        )
    return None


CHECKS: tuple[Check, ...] = (
    Check(
        "data.lines",
        "the lines of data",
        "every line of the training and validation files: encoding, JSON, roles, turns",
        check_lines,
        needs=NEEDS,
        limit_s=LIMIT_S,
    ),
    Check(
        "data.overlap",
        "training and validation data",
        "conversations that are in both files",
        check_overlap,
        needs=NEEDS,
        limit_s=LIMIT_S,
    ),
    Check(
        "data.tokens",
        "the tokens of the data",
        "how many tokens are trained, and how many examples are cut at seq_length",
        check_tokens,
        needs=(*NEEDS, "addresses"),
        limit_s=LIMIT_S,
    ),
)
