"""What leaves the house in a report, and what must not."""

from __future__ import annotations

import os
import pwd
import socket
import time

import pytest

from envbuilder.doctor.redact import Private, Redactor, private_here

ALICE = Private(
    users=frozenset({"alice42", "Alice Example"}),
    hosts=frozenset({"lrdn0001.cluster.example"}),
    accounts=frozenset({"EUHPC_D01"}),
    secrets=frozenset({"s3cr3t-value", "swordfish", "two words\nand a line"}),
)


def redact(text: str, private: Private = ALICE, *, ordinary: tuple[str, ...] = ()) -> str:
    redactor = Redactor(private, ordinary=ordinary)
    redactor.learn(text)
    redacted = redactor.redact(text)
    assert redactor.redact(redacted) == redacted, "what is redacted stays as it is"
    return redacted


HIDDEN = [
    # who
    ("/home/alice42/env/bin/python", "/home/<user>/env/bin/python"),
    ("/work/alice42_envs/x.log of ALICE42", "/work/<user>_envs/x.log of <user>"),
    ("made by Alice Example", "made by <user>"),
    ("/home/bob/a, /home/carol/b, /home/bob/c", "/home/<user-2>/a, /home/<user-3>/b, /home/<user-2>/c"),
    ("bob holds the lock /home/bob/.lock", "<user-2> holds the lock /home/<user-2>/.lock"),
    ("/leonardo/home/userexternal/dave00/x", "/leonardo/home/userexternal/<user-2>/x"),
    ("/home/a/alma/x and /home/users/erik/x", "/home/a/<user-2>/x and /home/users/<user-3>/x"),
    ("/scratch/bob/tmp.1", "/scratch/<user-2>/tmp.1"),
    ("ask bob.builder+hpc@uni-x.example.org.", "ask <email>."),
    ("--account=EUHPC_D01", "--account=<account-1>"),
    # where
    ("on lrdn0001: no GPU", "on <host-1>: no GPU"),
    ("lrdn0001.cluster.example and LRDN0001", "<host-1> and <host-1>"),
    ("lrdn0001 waits for lrdn0002 of lrdn[0001-0004]", "<host-1> waits for <host-2> of <host-3>"),
    ("connect to 10.3.9.90:29500 and 10.3.9.91", "connect to <address-1>:29500 and <address-2>"),
    ("inet 192.168.0.7/24, again 192.168.0.7.", "inet <address-1>/24, again <address-1>."),
    ("fe80::1%eth0 [2001:db8::7]:80 addr:fd00::5", "<address-1>%eth0 [<address-2>]:80 addr:<address-3>"),
    ("::ffff:10.0.0.5", "::ffff:<address-1>"),
    ("link/ether aa:bb:cc:00:11:22 brd", "link/ether <mac> brd"),
    # secrets
    ("the value is s3cr3t-value.", "the value is <secret>."),
    ("login with swordfish failed", "login with <secret> failed"),
    ("and a line", "<secret>"),
    ("?x=two%20words", "?x=<secret>"),
    ("HF_TOKEN=abc envbuilder fetch", "HF_TOKEN=<secret> envbuilder fetch"),
    ("export MY_PASSWORD='a b c'; ls", "export MY_PASSWORD=<secret>; ls"),
    ("DB_PASS=1234 MYSQL_PWD=x", "DB_PASS=<secret> MYSQL_PWD=<secret>"),
    ('{"api_key": "k\\"1", "n": 1}', '{"api_key": <secret>, "n": 1}'),
    ("https://h/?token=abc123&x=y", "https://h/?token=<secret>"),
    ("train --hub-token xyz --steps 4", "train --hub-token <secret> --steps 4"),
    ("WANDB_API_KEY=" + "0a" * 20, "WANDB_API_KEY=<secret>"),
    ("AWS_SECRET_ACCESS_KEY: wJalr/XUtn+FEMI", "AWS_SECRET_ACCESS_KEY: <secret>"),
    ("Authorization: Basic dXNlcjpwYXNz", "Authorization: <secret>"),
    ("curl -H 'authorization: token abc' x", "curl -H 'authorization: <secret>' x"),
    ("sent Bearer abcdef.ghi-jkl", "sent Bearer <secret>"),
    ("https://joe:pa@ss@host/x@v1", "https://<secret>@host/x@v1"),
    ("https://joe:p/w@host:8080/x", "https://<secret>@host:8080/x"),
    ("http://joe@host/", "http://<secret>@host/"),
    ("machine host login joe password hunter2", "machine host login <secret> password <secret>"),
    ("machine host\n  login joe\n  password hunter2", "machine host\n  login <secret>\n  password <secret>"),
    ("hunter2 is wrong: SOME_PASSWORD=hunter2", "<secret> is wrong: SOME_PASSWORD=<secret>"),
    ("a -----BEGIN RSA PRIVATE KEY-----\nMII\nx=\n-----END RSA PRIVATE KEY----- b", "a <private key> b"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA", "<private key>"),
    ("b3BlbnNzaC1rZXktdjEA\nb3BlbnNzaC1rZXktdjEA\n-----END PRIVATE KEY-----", "<private key>"),
    *(
        (f"got {token}, sorry", "got <secret>, sorry")
        for token in (
            "hf_" + "aB3" * 11,
            "ghp_" + "x9" * 18,
            "github_pat_11ABCDEFG0" + "x" * 20,
            "glpat-" + "x-1" * 7,
            "sk-proj-" + "a1" * 12,
            "AKIAIOSFODNN7EXAMPLE",
            "nvapi-" + "z" * 20,
            "eyJhbGciOiJI.eyJzdWIiOiIx.SflKx-w",
        )
    ),
]


@pytest.mark.parametrize(("text", "redacted"), HIDDEN, ids=[text[:40] for text, _ in HIDDEN])
def test_people_machines_and_secrets_are_replaced(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "sha256 " + "0a1b2c3d" * 8,
        "commit " + "0a" * 20,
        "nvidia-curand-cu12==10.3.9.90, nvidia-cudnn-cu12 9.10.2.21",
        "nvidia_curand_cu12-10.3.9.90-py3-none-manylinux2014_x86_64.whl",
        "opencv-4.11.0.86.tar.gz, version 10.3.9.90, cuDNN 9.10.2.21",
        "driver 580.65.06, torch 2.11.0+cu130, Python 3.12.4",
        "127.0.0.1, 0.0.0.0 and ::1, mask 255.255.255.0",
        "c10::add and std::fe::x, at 12:30:45, 0000:3b:00.0, GPU 00000000:3B:00.0",
        "cudaMalloc@libcudart.so.13, memcpy@GLIBC_2.14, _ZN3c105ErrorC2E",
        "git+https://github.com/org/repo@v2.8.3 git@github.com:org/repo.git",
        "TOKENIZERS_PARALLELISM=false max_tokens=4096 MAX_TOKENS: 131072 eos_token=</s>",
        "HF_TOKEN is not set; HF_TOKEN: missing; HF_TOKEN_PATH=/etc/hf/token",
        "missing key: model.layers.0.weight",
        "hf_hub_download, hf_transfer, task-sk-learn, ghp_x",
        "/root/.cache, /opt/envs/torch/lib, /scratch/shared/models, /home/projects",
        "2026-11-22T18:54:17+00:00 26-11-22-10-59-50 GPU-8f6c0f0e-1d3b-0b9a-9c5b-7d7a2f0b1c2d",
        "lrdn01 alice alice421 xalice42",
        "vm.overcommit_memory = 2",
    ],
)
def test_what_says_nothing_about_people_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("name", ["torch", "a", "max", "vllm"])
def test_a_user_named_like_a_word_or_a_package_is_replaced_where_a_name_stands(name: str) -> None:
    private = Private(users=frozenset({name}))
    text = f"/home/{name}/x /scratch/{name}: USER={name} ~{name}/y uid=1000({name}), owned by {name}"
    hidden = "/home/<user>/x /scratch/<user>: USER=<user> ~<user>/y uid=1000(<user>), owned by <user>"
    assert redact(text, private, ordinary=("vllm",)) == hidden
    text = f"import {name}; {name}-2.11.0 in /opt/{name}/lib needs {name}"
    assert redact(text, private, ordinary=("vllm",)) == text


def test_root_is_nobody_in_particular() -> None:
    text = "/home/root USER=root root@ /root"
    assert redact(text, Private(users=frozenset({"root"}))) == text


@pytest.mark.parametrize("name", ["vm", "gpu", "login"])
def test_a_machine_named_like_a_word_is_replaced_where_a_name_stands(name: str) -> None:
    private = Private(hosts=frozenset({name}))
    assert redact(f"hostname: {name}, ssh://{name}/", private) == "hostname: <host-1>, ssh://<host-1>/"
    assert redact(f"{name}.max_map_count of the {name}", private) == f"{name}.max_map_count of the {name}"


def test_an_account_named_like_a_word_is_replaced_where_a_name_stands() -> None:
    private = Private(accounts=frozenset({"project"}))
    assert redact("#SBATCH --account=project", private) == "#SBATCH --account=<account-1>"
    assert redact("sbatch -A project x", private) == "sbatch -A <account-1> x"
    assert redact("/work/project/x", private) == "/work/project/x"


def test_a_version_that_is_known_is_no_address() -> None:
    redactor = Redactor(Private(), versions={"4.11.0.86"})
    assert redactor.redact("opencv 4.11.0.86, node 10.0.0.1") == "opencv 4.11.0.86, node <address-1>"


def test_a_secret_that_is_an_ordinary_word_is_hidden_by_its_mark_alone() -> None:
    private = Private(secrets=frozenset({"python"}))
    assert redact("MY_PASSWORD=python python -V", private) == "MY_PASSWORD=<secret> python -V"


def test_what_was_learned_from_one_text_is_hidden_in_another() -> None:
    redactor = Redactor(Private())
    redactor.learn("export WANDB_API_KEY=0123abcd99\n/home/bob/x")
    assert redactor.redact("0123abcd99 of bob") == "<secret> of <user-1>"


def test_what_is_private_here_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {
        "USER": "alice42",
        "LOGNAME": "alice42",
        "HOME": "/cluster/home/al",
        "SLURMD_NODENAME": "node07",
        "SLURM_JOB_NODELIST": "node[07-09],big1",
        "SBATCH_ACCOUNT": "proj",
        "MASTER_ADDR": "10.0.0.1",
        "HF_TOKEN": "hf_short1",
        "HF_TOKEN_PATH": "/etc/token",
        "PIP_INDEX_URL": "https://joe:pass-of-joe@mirror/simple",
        "TOKENIZERS_PARALLELISM": "false",
        "EMPTY_KEY": "",
        "PATH": "/usr/bin",
    }
    private = private_here(environ, accounts=[None, "other"])
    assert private.users >= {"alice42", "al", pwd.getpwuid(os.getuid()).pw_name}
    assert private.hosts >= {socket.gethostname(), "node07", "big1"}
    assert "10.0.0.1" not in private.hosts
    assert private.accounts == {"proj", "other"}
    assert private.secrets == {"hf_short1", "pass-of-joe"}


def test_long_texts_take_no_long_time() -> None:
    hostile = [
        "A" * 20_000,
        "a-" * 10_000,
        "x:" * 10_000,
        "A" * 20 + "\n" * 1000,
        "1." * 10_000,
        "/u/" * 7_000,
    ]
    hostile += ["machine a " * 2_000, "https://a:" * 2_000, "-----BEGIN PRIVATE KEY-----" * 700]
    for text in hostile:
        began = time.process_time()
        redact(text)
        assert time.process_time() - began < 10, text[:20]
