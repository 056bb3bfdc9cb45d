"""Which tokens are trained: the assistant's, exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest

from trainer.chat import IGNORED, BrokenTemplate, InexactTemplate, encode, render
from trainer.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Où?"},
    {"role": "assistant", "content": "Là-bas, à côté: é"},
    {"role": "user", "content": "Danke <|end|> ☕"},
    {"role": "assistant", "content": "☕☕"},
]
UNMARKED = BYTE_CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


# As Qwen3 does it: reasoning is shown after the last question only, there is an empty one if there is none,
# and what tools answer stands in a user's turn.
QWEN_LIKE = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
  {%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
  {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
    {%- set ns.last = loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content %}
    {%- set reasoning = m.reasoning_content | default('') %}
    {%- if not reasoning and '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}{% generation %}
    {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
      {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}{{ content }}{% endif %}
    {%- for call in m.tool_calls | default([]) %}
      {{- '\\n' if content or not loop.first }}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}{% endgeneration %}
  {%- elif m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
  {%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

# As Nemotron 3 does it: the prompt opens the reasoning, earlier turns and those without have an empty one.
NEMOTRON_LIKE = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\\n' }}
  {%- for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- set thinks = m.reasoning_content and loop.index0 > ns.last %}
    {{- '<think>\\n' if thinks else '<think></think>' }}{% generation %}
    {{- m.reasoning_content + '\\n</think>\\n' if thinks }}{{ m.content | trim }}
    {%- for call in m.tool_calls | default([]) %}
      {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
      {%- for name, value in call.function.arguments | items %}
        {{- '<parameter=' ~ name ~ '>\\n' ~ value ~ '\\n</parameter>\\n' }}
      {%- endfor %}{{ '</function>\\n</tool_call>\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}{% endgeneration %}
  {%- elif m.role == 'tool' %}
    {%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user\\n' }}{% endif %}
    {{- '<tool_response>\\n' ~ m.content ~ '\\n</tool_response>\\n' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
  {%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
  {{- '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}
{%- endif %}
"""


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def without_markers(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def trained_text(messages: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[str]:
    """Runs of trained tokens, decoded."""
    ids, labels = encode(messages, tokenizer, **options)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_the_assistants_turns_are_trained_to_the_last_byte() -> None:
    assert trained_text(TALK, byte_tokenizer()) == ["Là-bas, à côté: é<|end|>", "☕☕<|end|>"]


def test_a_template_without_markers_gives_the_same_labels() -> None:
    marked, unmarked = byte_tokenizer(), byte_tokenizer()
    unmarked.chat_template = UNMARKED
    assert encode(TALK, unmarked) == encode(TALK, marked)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = UNMARKED.replace(
        "message['content'] + '<|end|>'", "(message['content'] if loop.last else '…') + '<|end|>'", 1
    )
    with pytest.raises(InexactTemplate, match="turn 3"):
        encode(TALK, tokenizer)


def test_the_byte_tokenizer_round_trips_any_text() -> None:
    tokenizer = byte_tokenizer()
    text = "tab\t, null \x00, Ω, 漢字, 🙂, é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 262


def random_talk(seed: int) -> list[dict[str, Any]]:
    """Questions, reasoning, tool calls and answers in any mix, of words that templates may stumble over."""
    chance = random.Random(seed)
    words = ["a", "A", "Z", "<", "<b>", "user", "{", "é", "\\", "\n", "<|im_end|>", "think", "Q0"]

    def text() -> str:
        made = "x".join(chance.choices(words, k=chance.randint(1, 4)))
        return made if made.strip() else text()

    talk: list[dict[str, Any]] = [{"role": "system", "content": text()}] if chance.random() < 0.5 else []
    for _ in range(chance.randint(1, 3)):
        talk.append({"role": "user", "content": text()})
        for _ in range(chance.choice([0, 0, 1, 2])):
            calls = [
                {"type": "function", "function": {"name": "f", "arguments": {"x": text(), "n": 3}}}
                for _ in range(chance.randint(1, 2))
            ]
            talk.append({"role": "assistant", "content": chance.choice(["", text()]), "tool_calls": calls})
            if chance.random() < 0.5:
                talk[-1]["reasoning_content"] = text()
            talk += [{"role": "tool", "content": text()} for _ in calls]
        talk.append({"role": "assistant", "content": text()})
        if chance.random() < 0.5:
            talk[-1]["reasoning_content"] = text()
    return talk


@pytest.mark.parametrize("template", [QWEN_LIKE, NEMOTRON_LIKE], ids=["qwen", "nemotron"])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_templates_that_drop_earlier_reasoning_give_the_spans_that_markers_give(
    template: str, train_on: Any
) -> None:
    marked, unmarked = with_template(template), with_template(without_markers(template))
    tools = [{"type": "function", "function": {"name": "f"}}]
    for seed in range(60):
        talk = random_talk(seed)
        expected = render(talk, marked, tools=tools, train_on=train_on)
        assert render(talk, unmarked, tools=tools, train_on=train_on) == expected, seed
        assert len(expected[1]) == (1 if train_on == "last" else sum(m["role"] == "assistant" for m in talk))


REASONED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "count"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6", "reasoning_content": "add"},
]


def test_what_is_trained_of_reasoning_is_what_the_prompt_does_not_give() -> None:
    qwen, nemotron = (with_template(without_markers(text)) for text in (QWEN_LIKE, NEMOTRON_LIKE))
    assert trained_text(REASONED, qwen) == ["4<|im_end|>\n", "<think>\nadd\n</think>\n\n6<|im_end|>\n"]
    assert trained_text(REASONED, nemotron) == ["4<|im_end|>\n", "add\n</think>\n6<|im_end|>\n"]


def test_reasoning_within_the_content_is_told_apart_too() -> None:
    qwen = with_template(without_markers(QWEN_LIKE))
    within = [
        {"role": m["role"], "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
        if "reasoning_content" in m
        else m
        for m in REASONED
    ]
    assert trained_text(within, qwen) == trained_text(REASONED, qwen)


def test_only_the_last_turn_or_everything_is_trained_on_request() -> None:
    for tokenizer in (byte_tokenizer(), with_template(UNMARKED)):
        assert trained_text(TALK, tokenizer, train_on="last") == ["☕☕<|end|>"]
        ids, labels = encode(TALK, tokenizer, train_on="all")
        assert labels == ids


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages[-2:] %}{{ m.role + m.content }}{% endfor %}", "does not show its words"),
        ("{% for m in messages | reverse %}{{ m.role + m.content }}{% endfor %}", "not in its place"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "more than once"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
            "closes it differently",
        ),
        (
            "{% for m in messages %}{{ ':' if loop.nextitem else '>' }}{{ m.content }}{% endfor %}"
            "{{ '!' if add_generation_prompt }}",
            "begins otherwise",
        ),
    ],
)
def test_a_template_that_does_not_tell_turns_apart_is_refused(template: str, reason: str) -> None:
    same = [TALK[1], TALK[2], TALK[1], TALK[2]]
    with pytest.raises(InexactTemplate, match=reason):
        encode(same, with_template(template))


def test_an_assistant_that_begins_needs_markers() -> None:
    talk = [{"role": "assistant", "content": "Hello!"}]
    assert trained_text(talk, byte_tokenizer()) == ["Hello!<|end|>"]
    with pytest.raises(InexactTemplate, match="turn 1"):
        encode(talk, with_template(UNMARKED))


def test_content_in_parts_reaches_templates_that_take_it_and_is_refused_by_others() -> None:
    parts = [{"type": "text", "text": "Où"}, {"type": "text", "text": "?"}]
    talk: list[dict[str, Any]] = [{"role": "user", "content": parts}, TALK[2]]
    takes = "{% for m in messages %}[{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}]{% endfor %}"  # noqa: E501
    assert trained_text(talk, with_template(takes)) == ["[Là-bas, à côté: é]"]
    prints = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    with pytest.raises(BrokenTemplate, match="message 1 has its content in parts"):
        encode(talk, with_template(prints))


def test_what_a_template_does_not_show_is_an_error() -> None:
    with pytest.raises(BrokenTemplate, match="message 2 has reasoning_content"):
        encode(REASONED, byte_tokenizer())
    with pytest.raises(BrokenTemplate, match="no such role"):
        encode(TALK, with_template("{{ raise_exception('no such role') }}"))
