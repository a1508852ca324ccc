"""Broken and hostile input ends in a sentence: a share of tests/damage.py, whole in a minute by
`python tests/damage.py`; --skip_bad, what is harmless, and control characters."""

import gzip
import json

import damage
import pytest
from conftest import assert_refused, run_script

from data import Tokenizer, read_examples, read_file
from eval import visible
from model import InputError


def test_damaged_files_are_refused_in_a_sentence_that_names_them(tmp_path):
    counts, failures = damage.run_all(tmp_path, every=9)
    assert not failures, failures[:3]
    assert counts["refused"] >= 500


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_a_shell_sees_status_2_and_no_traceback(script, tmp_path):
    path = damage.base(tmp_path)
    damage.LISTED["weights escape"][0](path)
    status, error = damage.run_command(script, path)
    assert status == 2 and "Traceback" not in error and len(error.splitlines()) == 1
    assert "model.safetensors" in error and "\x1b" not in error


BAD = [b"{", b'{"prompt": "\xff"}', b"[1]", b'{"prompt": "a", "completion": ""}', b"a" * 40_000_000]
BAD += [b'{"prompt": "a", "prompt": "b", "completion": "c"}', b'{"a":' * 10**5]


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
def test_skip_bad_keeps_the_good_lines_and_counts_the_others(name, tmp_path, chatml, capsys):
    good = [json.dumps(pair).encode() for pair in damage.PAIRS]
    lines = [line for pair in zip(good, BAD) for line in pair] + good[len(BAD) :]
    content, file = b"\n".join(lines), tmp_path / name
    file.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    found = read_examples([file], chatml, "tulu", 99, skip_bad=True)
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good))
    wanted = read_examples([tmp_path / "good.jsonl"], chatml, "tulu", 99)
    assert all((vars(found)[k] == array).all() for k, array in vars(wanted).items())
    said = capsys.readouterr().out
    assert said.startswith(f"{len(BAD)} bad examples") and f"{name}, line 2: " in said
    with pytest.raises(InputError, match=f"{name}, line 2: "):
        read_examples([file], chatml, "tulu", 99)


def test_a_line_after_one_that_is_too_long_keeps_its_number(tmp_path):
    file, bad = tmp_path / "some.jsonl", []
    file.write_bytes(b"a" * 2**24 + b"\n" + b"b" * (2**24 - 1) + b'\n{"a": 1}\n')
    assert list(read_file(file, bad)) == [(f"{file}, line 3", {"a": 1})]
    assert [message.split(": ")[0][-1] for message in bad] == ["1", "2"]


def test_skip_bad_trains_on_what_is_left(tmp_path, capsys):
    path = damage.base(tmp_path)
    with (path / "data.jsonl").open("a") as stream:
        stream.write('{"prompt": 3, "completion": "b"}\n')
    argv = damage.command("train.py", path)
    status = run_script("train.py", *argv)
    assert_refused(capsys.readouterr(), status, "data.jsonl", "line 9")
    assert run_script("train.py", *argv, "--skip_bad") == 0
    assert "1 bad example" in capsys.readouterr().out


def test_files_of_nothing_but_bad_lines_are_refused(tmp_path, chatml):
    file = tmp_path / "bad.jsonl"
    file.write_text("{\n[]\n")
    with pytest.raises(InputError, match="bad.jsonl"):
        read_examples([file], chatml, "tulu", 99, skip_bad=True)


def test_a_long_run_of_white_space_short_of_the_limit_is_encoded_and_beyond_it_refused(chatml):
    text = " " * 299_999 + "a"
    assert chatml.decode(chatml.encode(text)) == text
    for blank in (" ", "\n", "\t \u3000"):
        with pytest.raises(InputError, match="blanks"):
            chatml.encode("a" + blank * 300_000)


def test_no_control_character_reaches_the_terminal_from_an_answer():
    assert visible("a\x1b[2J\x07é\u3000漢\n\tb\x9b") == "a\\x1b[2J\\x07é\u3000漢\n\tb\\x9b"


@pytest.mark.parametrize(
    "named, argv",
    [
        ("meta", ["--device", "meta"]),
        ("temperature", ["--temperature", "-0.5"]),
        ("temperature", ["--temperature", "nan"]),
    ],
)
def test_odd_settings_are_refused(named, argv, tmp_path, capsys):
    path = damage.base(tmp_path)
    argv = ["--model", path / "model", "--prompt", "what is", *argv]
    status = run_script("eval.py", *argv)
    assert_refused(capsys.readouterr(), status, named)


def test_a_tokenizer_file_is_read_the_same_with_a_byte_order_mark(tmp_path):
    path = damage.base(tmp_path) / "model"
    before = Tokenizer.from_pretrained(path).encode("the capital of France")
    content = (path / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert Tokenizer.from_pretrained(path).encode("the capital of France") == before
