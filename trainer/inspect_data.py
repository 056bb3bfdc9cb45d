"""`python -m trainer.inspect_data CONFIG.yaml [--examples N] [--set section.key=value …]`: what is trained.

Prints the first examples as the model will read them, with the tokens that the loss is on marked: in colour
on a terminal, between ⟦ and ⟧ elsewhere. Then the share of trained tokens in the whole file.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.__main__ import OFFLINE
from trainer.errors import TrainerError
from trainer.reading import read_config

if TYPE_CHECKING:
    from trainer.data import Dataset, Example

PLAIN_MARKS = ("⟦", "⟧")
COLOUR_MARKS = ("\x1b[1;32m", "\x1b[0m")


def main() -> int:
    """Shows the examples of the config on the command line; the exit code is the error's, if there is one."""
    parser = argparse.ArgumentParser(prog="trainer.inspect_data", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--examples", type=int, default=3, help="how many are shown")
    arguments = parser.parse_args()
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        for line in inspect_data(
            arguments.config,
            arguments.overrides,
            examples=arguments.examples,
            marks=COLOUR_MARKS if colour else PLAIN_MARKS,
        ):
            print(line)
    except TrainerError as problem:
        print(f"{problem.message}\n  remedy: {problem.remedy}", file=sys.stderr)
        return problem.exit_code
    return 0


def inspect_data(file: Path, overrides: list[str], *, examples: int, marks: tuple[str, str]) -> Iterator[str]:
    """The lines to print. Raises TrainerError, also where nothing would be trained."""
    config = read_config(file, overrides)
    os.environ.update(OFFLINE)
    warnings.simplefilter("ignore")
    # torch takes seconds to import.
    from trainer.data import open_dataset, trained_tokens
    from trainer.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(config.model)
    data = open_dataset(config.dataset, tokenizer, vocab_size=len(tokenizer), seed=config.seed)
    for example in data.examples[:examples]:
        tokens, trained = len(example.input_ids), trained_tokens(example)
        yield f"line {example.line}: {trained} of {tokens} tokens trained ({trained / tokens:.1%})"
        yield marked(example, tokenizer, marks)
        yield ""
    yield summary(data)


def marked(example: Example, tokenizer: Any, marks: tuple[str, str]) -> str:
    """The example's text, decoded from its tokens, with every run of trained ones between the marks."""
    from trainer.chat import IGNORED

    trained = [False, *(label != IGNORED for label in example.labels[1:])]  # nothing predicts the first
    parts = []
    for is_trained, run in groupby(zip(example.input_ids, trained, strict=True), key=lambda pair: pair[1]):
        before, behind = marks if is_trained else ("", "")
        parts.append(before + tokenizer.decode([token for token, _ in run]) + behind)
    return "".join(parts)


def summary(data: Dataset) -> str:
    """What the whole file holds, in one line."""
    figures = data.figures()
    packed = "; packed into {rows} rows, {filled:.1%} full" if "rows" in figures else ""
    return (
        "{name}: {examples} examples, {trained_tokens} of {tokens} tokens trained ({trained_share:.1%}), "
        "{truncated} truncated, {dropped} left out" + packed
    ).format(**figures)


if __name__ == "__main__":
    sys.exit(main())
